"""Every way of writing, loaded by transformers 4.57 in an environment of its own (`make test-portable`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from benchmarks.weights import smollm2
from transformers import AutoTokenizer

from excise.models.loading import load
from excise.models.stack import find_stack, gated
from excise.surgery.checkpoint import write_pruned
from excise.surgery.on_disk import prune_folder
from tests.gguf_files import write_gguf
from tests.released import ROPE_THETA, edit_json, released_folder
from tests.tiny import removable_pair, tiny_model, tiny_tokenizer

OLD_PYTHON = Path(os.environ.get("EXCISE_OLD_PYTHON", "build/transformers-4.57/bin/python"))
SCRIPT = Path(__file__).with_name("old_transformers.py")
REMOVED, KEPT = [1, 4], [0, 2, 3, 5]
IDS = [7, 81, 250, 33, 9, 120, 64, 200]
TEXT = "<|im_start|>user\nGrüß Gott, a quick fox<|im_end|>"

pytestmark = [
    pytest.mark.portable,
    pytest.mark.slow,
    pytest.mark.skipif(not OLD_PYTHON.exists(), reason="no environment with transformers 4.57; make test-portable"),
]

REPAIR = ("--repair", "--samples", 24, "--held-out", 8, "--tokens", 32)
HEAL = ("--samples", 12, "--tokens", 24, "--held-out", 0.3, "--steps", 3, "--batch", 4, "--lr", 1e-3)


@pytest.fixture
def ask(tmp_path):
    """Put questions to transformers 4.57, see `old_transformers.py`."""

    def ask(questions):
        path = tmp_path / "questions.json"
        empty = {"original": None, "kept": KEPT, "take_weights": False, "logits": None, "ids": IDS, "text": TEXT}
        path.write_text(json.dumps([{**empty, **question} for question in questions]))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [OLD_PYTHON, "-I", SCRIPT, path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return ask


# Model type → ways of writing it: name → verb and options; and whether weights change.
WAYS = {
    "folder": (("prune", "--removed", "1,4"), False),
    "repaired": (("prune", "--removed", "1,4", *REPAIR), True),
    "merged": (("prune", "--removed", "1,4", "--merge", "figure"), True),
    "sublayers": (("prune", "--removed", "1,4", "--removed-sublayers", "3.attention"), True),
    "healed": (("heal", *HEAL), True),
}
# Merging and this repair are defined for dense blocks, and a repair that does not help is not written.
WITHOUT = {"qwen3_moe": {"merged", "repaired"}, "qwen3": {"repaired"}}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe"])
def test_ways_from_a_folder(model_type, tmp_path, excise, ask):
    source = released_folder(tmp_path / "model", model_type, loud=(1, 4))
    ways = [way for way in WAYS if way not in WITHOUT.get(model_type, ())]
    for way in ways:
        verb, *options = WAYS[way][0]
        model, *others = [source] if verb == "prune" else [tmp_path / "folder", "--teacher", source]
        code, _, err = excise(verb, model, *others, *options, "--out", tmp_path / way)
        assert code == 0, err
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["rope_theta"] == ROPE_THETA
    if "repaired" in ways:
        assert "repair" in json.loads((tmp_path / "repaired" / "excise.json").read_text())
    questions = [{"folder": str(tmp_path / way), "original": str(source), "take_weights": WAYS[way][1]} for way in ways]
    answers = dict(zip(ways, ask(questions), strict=True))
    for way, answer in answers.items():
        require_right(way, answer, 0.0)
    print(f"\n{model_type}: " + told(answers))


def test_gguf_source(tmp_path, excise, ask):
    base = {"rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"}}
    write_gguf(tiny_model("llama", **base), tmp_path / "model.gguf")
    assert excise("prune", tmp_path / "model.gguf", "--removed", "1,4", "--out", tmp_path / "out")[0] == 0
    (answer,) = ask([{"folder": str(tmp_path / "out"), "original": str(tmp_path / "model.gguf")}])
    require_right("GGUF", answer, 0.0, AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"])
    print("\nllama: " + told({"GGUF source": answer}))


# Model type → what its config says in the words of version 4.57, removed blocks.
WORDS = {
    "granitemoehybrid": ({"layer_types": ["mamba", "attention"] * 3}, [1, 2]),
    "smollm3": ({}, [1, 4]),
    "gemma3_text": ({"layer_types": None, "sliding_window_pattern": 3}, [0, 5]),
    "qwen3_moe": ({"num_experts": 4, "num_local_experts": None}, [1, 4]),
    "qwen3_next": ({"layer_types": None, "full_attention_interval": 3}, [0, 1, 5]),
    "lfm2": ({"layer_types": None, "full_attn_idxs": [2, 5]}, [0, 2]),
}


def test_configs_in_the_words_of_version_4_57(tmp_path, ask):
    """Pruned folder to folder: lists are cut as they stand, and what was left to a default is written out."""
    questions = []
    for model_type, (words, removed) in WORDS.items():
        source = released_folder(tmp_path / model_type, model_type)
        absent = [key for key, value in words.items() if value is None]
        edit_json(source / "config.json", *absent, **{key: value for key, value in words.items() if value is not None})
        prune_folder(source, removed, tmp_path / f"{model_type}-pruned")
        stack = load(str(source)).stack
        alpha = torch.ones(len(stack.sublayers))
        alpha[[s.gate for s in stack.sublayers if s.block in removed]] = 0
        with torch.no_grad(), gated(stack, alpha):
            logits = stack.model(input_ids=torch.tensor([IDS]), use_cache=False).logits
        questions.append({"folder": str(tmp_path / f"{model_type}-pruned"), "logits": logits.tolist()})
    answers = dict(zip(WORDS, ask(questions), strict=True))
    print("\nwords of 4.57: " + told(answers))
    for model_type, answer in answers.items():
        require_right(model_type, answer, 1e-4)


# All that both versions know.
IN_MEMORY = [
    "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text",
    "olmo2", "mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "smollm3", "falcon_h1", "lfm2",
    "mamba2", "jamba", "qwen3_next", "granitemoehybrid",
]  # fmt: skip


def test_models_made_in_memory(tmp_path, ask):
    questions = []
    for model_type in IN_MEMORY:
        # With several groups version 4.57 computes Mamba-2 otherwise, whatever the config says.
        options = {"n_groups": 1} if model_type == "mamba2" else {}
        stack, removed = find_stack(tiny_model(model_type, **options)), removable_pair(model_type)
        write_pruned(stack, removed, tmp_path / model_type, tokenizer=tiny_tokenizer())
        alpha = torch.ones(len(stack.sublayers))
        alpha[[s.gate for s in stack.sublayers if s.block in removed]] = 0
        with torch.no_grad(), gated(stack, alpha):
            logits = stack.model(input_ids=torch.tensor([IDS]), use_cache=False).logits
        questions.append({"folder": str(tmp_path / model_type), "logits": logits.tolist()})
    answers = dict(zip(IN_MEMORY, ask(questions), strict=True))
    print("\nin memory: " + told(answers))
    for model_type, answer in answers.items():
        require_right(model_type, answer, 1e-4)


def require_right(way, answer, tolerance, ids=None):
    """Everything loads, logits agree up to a share of the largest, and the text is encoded as version 5 does."""
    assert "error" not in answer, (way, answer)
    assert not answer["keys"], (way, answer)
    assert answer["largest"] > 1, (way, answer)
    assert answer["difference"] <= tolerance * answer["largest"], (way, answer)
    assert answer["ids"] == (ids or tiny_tokenizer()(TEXT)["input_ids"]), (way, answer)


def told(answers):
    """Figures in one line."""
    return "; ".join(
        f"{way}: {answer.get('error') or '{difference:.3g} of {largest:.3g}'.format(**answer)}"
        for way, answer in answers.items()
    )


@pytest.mark.real
@pytest.mark.skipif(smollm2() is None, reason="SmolLM2 is not installed")
def test_a_real_model(tmp_path, excise, ask):
    """SmolLM2-135M-Instruct: its GGUF file to a folder, and that folder pruned again, repaired, merged and healed."""
    weights, gone = smollm2(), [5, 13, 17]
    assert excise("prune", weights, "--removed", "24", "--out", tmp_path / "GGUF source", "--no-self-test")[0] == 0
    folder = tmp_path / "GGUF source"
    for way, (verb, *options) in {
        "folder": ("prune",),
        "repaired": ("prune", "--repair", "--samples", 48, "--held-out", 8, "--tokens", 96),
        "merged": ("prune", "--merge", "figure"),
        "healed": ("heal", "--teacher", folder, *HEAL, "--tokens", 128),
    }.items():
        if verb == "prune":
            arguments = [folder, "--removed", ",".join(map(str, gone)), "--no-self-test", *options]
        else:
            arguments = [tmp_path / "folder", *options]
        code, _, err = excise(verb, *arguments, "--out", tmp_path / way)
        assert code == 0, err
    assert "repair" in json.loads((tmp_path / "repaired" / "excise.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    common = {"ids": tokenizer("The capital of France is Paris, and that of Italy")["input_ids"]}
    kept = [block for block in range(30) if block != 24]
    questions = [{"folder": str(folder), "original": str(weights), "kept": kept, **common}]
    kept = [block for block in range(29) if block not in gone]
    questions += [
        {
            "folder": str(tmp_path / way),
            "original": str(folder),
            "kept": kept,
            "take_weights": way != "folder",
            **common,
        }
        for way in ("folder", "repaired", "merged", "healed")
    ]
    answers = dict(zip(("GGUF source", "folder", "repaired", "merged", "healed"), ask(questions), strict=True))
    print("\nSmolLM2: " + told(answers))
    for way, answer in answers.items():
        require_right(way, answer, 0.0, tokenizer(TEXT)["input_ids"])
