"""The self-test in a fresh process: passes what is right, and does not pass what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.errors import InputError
from excise.models.stack import find_stack
from excise.surgery.checkpoint import write_pruned
from excise.surgery.self_test import self_test
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.fresh_process
@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("qwen2", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("gemma3", "nemotron_h"))],
)
def test_a_good_checkpoint_passes(model_type, tied, tmp_path):
    stack = find_stack(tiny_model(model_type, tied=tied))
    write_pruned(stack, [0, 2], tmp_path / "out", tokenizer=tiny_tokenizer())
    report = self_test(stack, [0, 2], tmp_path / "out")
    assert report["loads_in_stock_transformers"]
    assert report["cache_agrees"]
    assert report["without_excise"]
    assert report["tokenizer_loads"]
    assert report["missing_keys"] == report["unexpected_keys"] == report["mismatched_keys"] == []
    assert report["max_abs_logit_difference"] < 1e-5 * report["max_abs_logit"]
    assert report["generated_tokens"] == 24
    assert (report["passed"], report["level"], report["untested"]) == (True, "generates", {})


def test_a_cache_that_never_agreed_is_not_held_against_the_surgery(tmp_path):
    """Nemotron-H in transformers clamps the time steps of a prompt, and not those of single tokens."""
    stack = find_stack(tiny_model("nemotron_h", time_step_min=0.5))
    write_pruned(stack, [1, 5], tmp_path / "out")
    report = self_test(stack, [1, 5], tmp_path / "out")
    assert report["loads_in_stock_transformers"]
    assert report["max_abs_logit_difference"] < 1e-5 * report["max_abs_logit"]
    assert (report["cache_agrees"], report["original_cache_agrees"]) == (False, False)
    assert (report["passed"], report["level"], report["untested"].keys()) == (
        True,
        "logits",
        {"tokenizer", "generates"},
    )


def test_a_wrong_checkpoint_is_found_out(tmp_path):
    """Another block removed, a weight lost, and a stray one added."""
    stack = find_stack(tiny_model("llama"))
    write_pruned(stack, [2], tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("model.layers.4.mlp.up_proj.weight")
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    report = self_test(stack, [1], tmp_path / "out", torch.arange(80).reshape(2, 40))
    assert not report["loads_in_stock_transformers"]
    assert report["missing_keys"] == ["model.layers.4.mlp.up_proj.weight"]
    assert report["unexpected_keys"] == ["model.layers.9.mlp.up_proj.weight"]
    assert report["max_abs_logit_difference"] > 0.1
    assert report["tokenizer_loads"] is None


@pytest.mark.fresh_process
def test_a_checkpoint_that_does_not_read_back_has_failed(tmp_path):
    stack = find_stack(tiny_model("llama"))
    write_pruned(stack, [2], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    report = self_test(stack, [2], tmp_path / "out")
    assert (report["passed"], report["level"]) == (False, "none")
    assert "no_such_model" in report["failed"][0]


def test_token_ids_must_be_a_batch(tmp_path):
    with pytest.raises(InputError, match=r"\[sequences, tokens\]"):
        self_test(find_stack(tiny_model("llama")), [2], tmp_path, torch.arange(5))
