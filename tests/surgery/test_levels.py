"""What cannot be tested is told with its reason, what failed gets no name, and NaN is a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.errors import SelfTestError, UntestableError
from excise.models.stack import find_stack
from excise.surgery import self_test as self_test_module
from excise.surgery.check import check_pruned
from excise.surgery.checkpoint import write_pruned
from excise.surgery.on_disk import prune_folder
from excise.surgery.proof import Proof, in_words
from excise.surgery.self_test import in_fresh_process, self_test
from tests.gguf_files import write_gguf
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


def change_json(path, **values):
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **values}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def poison(name, value=float("nan"), row=0):
    """A change of weights that sets one row of a tensor."""

    def change(weights):
        weights[name][row] = value

    return change


def without_head(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))


def with_another_head(folder):
    def change(weights):
        weights["score.weight"] = weights.pop("lm_head.weight")[:2].clone()

    change_weights(folder, change)


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def with_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def with_own_tokenizer_code(folder):
    change_json(
        folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}
    )
    (folder / "mine.py").write_text("class Mine: ...\n")


def generation(**values):
    return lambda folder: change_json(folder / "generation_config.json", **values)


# A right removal of a model that is odd in some way → options of the tiny model, what is done to its folder, the level
# that is proved, and what cannot be tested.
ODD = {
    "no tokenizer": ({}, without_tokenizer, "generates", {"tokenizer"}),
    "a tokenizer that does not load": ({}, with_broken_tokenizer, "generates", {"tokenizer"}),
    "a tokenizer with code of its own": ({}, with_own_tokenizer_code, "generates", {"tokenizer"}),
    "stop strings": ({}, generation(stop_strings=["\n\n"]), "generates", set()),
    "beams and penalties": (
        {},
        generation(num_beams=3, length_penalty=0.5, no_repeat_ngram_size=2),
        "generates",
        set(),
    ),
    "forced tokens": ({}, generation(forced_bos_token_id=5, max_length=3), "generates", set()),
    "guidance": ({}, generation(guidance_scale=1.5, do_sample=True, top_k=3), "generates", set()),
    "a generation config that is no JSON": (
        {},
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generates",
        set(),
    ),
    "24 learned positions": ({"model_type": "gpt2", "n_positions": 24}, None, "generates", set()),
    "24 learned positions, with an offset": (
        {"model_type": "opt", "max_position_embeddings": 24},
        None,
        "generates",
        set(),
    ),
    "two positions": ({"model_type": "gpt2", "n_positions": 2}, None, "names", {"logits", "generates"}),
    "no head": ({}, without_head, "names", {"logits", "generates"}),
    "another head": ({}, with_another_head, "names", {"logits", "generates"}),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_right_removal_of_an_odd_model_is_delivered_with_a_warning(kind, excise, tmp_path):
    options, change, level, untested = ODD[kind]
    source = tiny_folder(tmp_path / "model", **{"model_type": "llama", "layers": 3, **options})
    if change:
        change(source)
    code, text, err = excise("prune", source, "--removed", "1", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    report = json.loads(text)["self_test"]
    assert (report["passed"], report["level"], set(report["untested"])) == (True, level, untested)
    assert ("warning: not tested of out" in err) == bool(untested)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("option", [("--merge", "figure"), ("--removed-sublayers", "2.attention")])
def test_what_reads_no_text_needs_no_tokenizer(option, excise, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    without_tokenizer(source)
    code, _, err = excise("prune", source, "--removed", "1", *option, "--out", tmp_path / "out")
    assert (code, "tokenizer (there is none)" in err) == (0, True)


# What is wrong with a model, so that no pruned one can be right → the change, and what is said.
POISONED = {
    "NaN in a block": (poison("model.layers.2.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "NaN in a norm": (poison("model.norm.weight"), "model.norm.weight"),
    "NaN in the row of a token that no test reads": (poison("model.embed_tokens.weight", row=287), "embed_tokens"),
    "a norm that overflows": (
        lambda tensors: tensors["model.norm.weight"].fill_(3e38),
        "its logits are not finite",
    ),
    "infinity in the head": (poison("lm_head.weight", float("inf"), row=3), "lm_head.weight"),
}


@pytest.mark.parametrize("kind", POISONED)
def test_numbers_that_are_none_are_a_failure_and_nothing_is_left(kind, excise, tmp_path):
    change, said = POISONED[kind]
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    change_weights(source, change)
    code, text, err = excise("prune", source, "--removed", "1", "--out", tmp_path / "out", "--json")
    assert (code, text) == (1, "")
    assert said in err
    assert "not finite" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nan_in_what_is_removed_is_no_failure_of_what_is_left(excise, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    change_weights(source, poison("model.layers.1.mlp.up_proj.weight"))
    code, text, _ = excise("prune", source, "--removed", "1", "--out", tmp_path / "out", "--json")
    report = json.loads(text)["self_test"]
    assert (code, report["passed"], report["level"]) == (0, True, "names")
    assert "original's own logits are not finite" in report["untested"]["logits"]


def test_nan_fails_where_the_model_does_not_fit_too(monkeypatch, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    change_weights(source, poison("model.layers.2.mlp.up_proj.weight"))
    monkeypatch.setattr("excise.surgery.check.free_everywhere", lambda: 1000)
    with pytest.raises(SelfTestError, match="not finite"):
        prune_folder(source, [1], tmp_path / "out", test=lambda place: check_pruned(source, [1], place))
    assert not (tmp_path / "out").exists()


def test_nan_in_a_gguf_file_is_a_failure(excise, tmp_path):
    model = tiny_model("llama", 3)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    write_gguf(model, tmp_path / "a.gguf")
    code, _, err = excise("prune", tmp_path / "a.gguf", "--removed", "1", "--out", tmp_path / "b.gguf")
    assert (code, "output_norm.weight" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def of_another_block(weights):
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].clone()


def a_stray(weights):
    weights["model.stray.weight"] = torch.ones(2)


def weights(change):
    return lambda folder: change_weights(folder, change)


# What a writer might do wrong → a change of the folder that was written, and what is said of it.
WRONG = {
    "another block": (weights(of_another_block), "its logits differ"),
    "a weight lost": (weights(lambda tensors: tensors.pop("model.norm.weight")), "1 missing"),
    "a weight too many": (weights(a_stray), "1 unexpected"),
    "a config of another width": (lambda folder: change_json(folder / "config.json", intermediate_size=8), "does not"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "do not read back"),
    "a tokenizer cut short": (with_broken_tokenizer, "its tokenizer does not load"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_result_fails_and_what_was_there_before_stays(kind, tmp_path):
    change, said = WRONG[kind]
    source, out = tiny_folder(tmp_path / "model", "llama", layers=3), tmp_path / "out"
    prune_folder(source, [2], out)
    before = (out / "excise.json").read_bytes()

    def test(place):
        change(place)
        return check_pruned(source, [1], place)

    with pytest.raises(SelfTestError, match=said):
        prune_folder(source, [1], out, overwrite=True, test=test)
    assert (out / "excise.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


SAMPLES = ("--samples", 20, "--tokens", 16)
QUICK = (*SAMPLES, "--held-out", 0.2, "--steps", 2, "--batch", 4)


def test_heal_delivers_what_a_generation_config_keeps_from_generating(excise, tmp_path):
    source = tiny_folder(tmp_path / "model", "gpt2", layers=3, n_positions=24)
    generation(stop_strings=["\n\n"], num_beams=2)(source)
    assert excise("prune", source, "--removed", "1", "--out", tmp_path / "pruned")[0] == 0
    code, text, err = excise(
        "heal", tmp_path / "pruned", "--teacher", source, "--out", tmp_path / "out", *QUICK, "--json"
    )
    assert code == 0, err
    report = json.loads(text)["self_test"]
    assert (report["passed"], report["level"], report["untested"]) == (True, "generates", {})


@pytest.fixture
def failing(monkeypatch):
    """A test that every checkpoint written from memory fails."""
    report = Proof(failed=["it is not what it should be"]).report()
    for module in ("excise.healing.heal", "excise.surgery.check"):
        monkeypatch.setattr(f"{module}.check_loaded", lambda *_, **__: report)


def test_a_healing_that_fails_its_test_keeps_its_training(failing, excise, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    assert excise("prune", source, "--removed", "1", "--out", tmp_path / "pruned", "--no-self-test")[0] == 0
    code, _, err = excise("heal", tmp_path / "pruned", "--teacher", source, "--out", tmp_path / "out", *QUICK)
    assert (code, "it is not what it should be" in err, "training is kept" in err) == (1, True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "model", "pruned"]


def test_a_run_gives_no_name_to_a_checkpoint_that_failed(failing, excise, tmp_path):
    source, out = tiny_folder(tmp_path / "model", "llama", layers=4), tmp_path / "run"
    options = ("--held-out", 4, "--effort", 0, "--rivals", "", "--random-states", 0)
    code, _, err = excise("run", source, "--remove", 1, "--out", out, *SAMPLES, *options)
    assert (code, "it is not what it should be" in err) == (1, True)
    assert not {"model", "run.json"} & {path.name for path in out.iterdir()}
    assert not list(out.glob(".*"))


# How the fresh process may end without a report, which says nothing about the checkpoint.
SILENT = {
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "without transformers": "raise ModuleNotFoundError('No module named transformers')",
    "slow": "import time; time.sleep(60)",
}


@pytest.mark.fresh_process
@pytest.mark.parametrize("kind", SILENT)
def test_a_process_without_a_report_leaves_the_checkpoint_untested(kind, monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SILENT[kind])
    with pytest.raises(UntestableError):
        in_fresh_process(script, tmp_path, timeout_s=2)
    monkeypatch.setattr(self_test_module, "STOCK_LOAD", script)
    stack = find_stack(tiny_model("llama", 3))
    write_pruned(stack, [1], tmp_path / "out", tokenizer=tiny_tokenizer())
    report = self_test(stack, [1], tmp_path / "out", timeout_s=2)
    assert (report["passed"], report["level"]) == (True, "files")
    assert set(report["untested"]) == {"names", "logits", "generates"}


def test_the_fresh_process_dies_with_its_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import os, time; open({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid())); time.sleep(300)")
    parent_code = (
        "import sys; from pathlib import Path; from excise.surgery.self_test import in_fresh_process; "
        "in_fresh_process(Path(sys.argv[1]), Path('.'), timeout_s=300)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", parent_code, str(script)], env=environment)
    child = int(_appears(tmp_path / "id"))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not _lives(child):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def _appears(path):
    for _ in range(600):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    pytest.fail(f"no {path}")


def _lives(process):
    """Whether a process runs; a zombie that nobody has asked for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_report_is_said_in_words():
    proof = Proof()
    proof.judge("files", None)
    proof.leave("no tool", "names", "logits", "generates")
    assert in_words(proof.report()) == (
        "passed: its files are whole and every number in them is finite; not tested: names, logits, generates (no tool)"
    )
    proof.judge("names", "2 missing")
    assert in_words(proof.report()) == "failed: 2 missing"
    assert in_words(Proof().report()) == "nothing was proved"
