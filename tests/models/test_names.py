"""Names as transformers' loader reads them: which tensors are the blocks', what is dropped, what counts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from excise.errors import CheckpointError
from excise.models.architectures import architecture_of
from excise.models.headers import read_checkpoint
from excise.models.loading import load
from excise.models.names import names_in
from excise.surgery.on_disk import prune_folder
from tests.released import edit_json
from tests.tiny import tiny_config, tiny_folder, tiny_tokenizer

REMOVED, KEPT = [1, 4], (0, 2, 3, 5)


def respell(folder, renamed, extra=None):
    """Save the weights under other names, with further tensors beside them."""
    weights = {renamed(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**weights, **(extra or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(prefix):
    return lambda name: name.removeprefix(prefix)


# Name → model type, other spelling of the names, prefix of the blocks in the file.
SPELLINGS = {
    "as saved": ("llama", str, "model.layers"),
    "an embedding model's": ("qwen3", without("model."), "layers"),
    "a base model's with experts": ("qwen3_moe", without("model."), "layers"),
    "old GPT-2": ("gpt2", without("transformer."), "h"),
    "old OPT": ("opt", without("model."), "decoder.layers"),
    "Pythia's base": ("gpt_neox", without("gpt_neox."), "layers"),
    "a hybrid's own": ("nemotron_h", str, "backbone.layers"),
    "a hybrid's in transformers' words": ("nemotron_h", lambda n: n.replace("backbone.", "model.", 1), "model.layers"),
    "Mamba's base": ("mamba2", without("backbone."), "layers"),
    "Gemma 3 as released": ("gemma3", str, "language_model.model.layers"),
    "a text model in a multimodal one's words": (
        "qwen3_5_text",
        lambda name: name.replace("model.", "model.language_model.", 1),
        "model.language_model.layers",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_blocks_are_found_under_every_spelling_that_loads(spelling, tmp_path):
    model_type, renamed, prefix = SPELLINGS[spelling]
    source = respell(tiny_folder(tmp_path / "model", model_type), renamed)
    names = names_in(AutoConfig.from_pretrained(source))
    stored = [tensor.name for tensor in read_checkpoint(source).tensors]
    assert names.block_prefixes(stored, architecture_of(model_type)) == (prefix,)
    prune_folder(source, REMOVED, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    pruned, original = model.state_dict(), AutoModelForCausalLM.from_pretrained(source).state_dict()
    stack = architecture_of(model_type).stack
    for name, tensor in pruned.items():
        if name.startswith(f"{stack}."):
            new, _, rest = name.removeprefix(f"{stack}.").partition(".")
            name = f"{stack}.{KEPT[int(new)]}.{rest}"
        assert torch.equal(tensor, original[name]), name


def mtp(prefix="mtp"):
    return {f"{prefix}.layers.0.self_attn.q_proj.weight": torch.ones(8, 32), f"{prefix}.norm.weight": torch.ones(32)}


# Name → model type, what else the file holds, config keys, of that what stays in the file.
BESIDE = {
    "Qwen3-Next's prediction": ("qwen3_next", mtp(), {"num_nextn_predict_layers": 1}, set()),
    "Qwen 3.5's prediction": ("qwen3_5_text", mtp(), {"mtp_num_hidden_layers": 1}, set()),
    "Nemotron's prediction": ("nemotron_h", mtp(), {"num_nextn_predict_layers": 1}, set()),
    "old Llama's angles": (
        "llama",
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(6)},
        {},
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)},
    ),
    "GPT-2's masks": (
        "gpt2",
        {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 9, 9) for i in range(6)},
        {},
        {f"transformer.h.{i}.attn.bias" for i in range(4)},
    ),
    "a head that is tied": ("llama", {"lm_head.weight": None}, {"tie_word_embeddings": True}, {"lm_head.weight"}),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_what_the_loader_drops_is_no_parameter(beside, tmp_path):
    model_type, extra, keys, stays = BESIDE[beside]
    source = tiny_folder(tmp_path / "model", model_type, tied="tie_word_embeddings" in keys)
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    embedding = load_file(source / "model.safetensors").get("model.embed_tokens.weight")
    respell(source, str, {name: embedding.clone() if t is None else t for name, t in extra.items()})
    edit_json(source / "config.json", **keys)
    recipe = prune_folder(source, REMOVED, tmp_path / "out")
    assert recipe["parameters"]["before"] == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert recipe["parameters"]["after"] == sum(parameter.numel() for parameter in model.parameters())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in written if name in extra} == stays
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(config[key] == 0 for key in keys if "predict" in key or "mtp" in key)
    assert ("left_out" in recipe) == any(name.startswith("mtp") for name in extra)


def test_towers_of_a_multimodal_model_stay_and_its_prediction_goes(tmp_path):
    config = tiny_config("qwen3_5")
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    respell(tmp_path / "model", str, mtp())
    recipe = prune_folder(tmp_path / "model", REMOVED, tmp_path / "out")
    assert recipe["left_out"] == {"mtp.*": "transformers does not load it"}
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert recipe["parameters"]["after"] == sum(parameter.numel() for parameter in model.parameters())


HEADS = {  # what saves it → message when it is to be measured
    "none": (AutoModel, r"has no language-model head, so"),
    "a classifier": (AutoModelForSequenceClassification, r"no language-model head but another \(score\.weight\)"),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("head", HEADS)
def test_another_head_or_none_is_pruned_and_not_measured(head, model_type, tmp_path):
    kind, message = HEADS[head]
    original = kind.from_config(tiny_config(model_type))
    original.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        load(str(tmp_path / "model"))
    recipe = prune_folder(tmp_path / "model", REMOVED, tmp_path / "out")
    pruned, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert recipe["parameters"]["before"] == sum(parameter.numel() for parameter in original.parameters())
    assert recipe["parameters"]["after"] == sum(parameter.numel() for parameter in pruned.parameters())


def test_an_embedding_model_with_tied_weights_is_measured_as_a_language_model(tmp_path):
    """Qwen3-Embedding: no head of its own, since the embedding is one."""
    model = AutoModel.from_config(tiny_config("qwen3", tied=True))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    assert len(loaded.stack.blocks) == 6
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model" / "model.safetensors")


def test_a_class_that_transformers_does_not_have_is_read_as_a_language_model(tmp_path):
    source = tiny_folder(tmp_path / "model", "llama")
    edit_json(source / "config.json", architectures=["MineForCausalLM"], auto_map={"AutoModel": "org/name--mine.Mine"})
    recipe = prune_folder(source, REMOVED, tmp_path / "out")
    assert recipe["parameters"]["after"] < recipe["parameters"]["before"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MineForCausalLM"]
