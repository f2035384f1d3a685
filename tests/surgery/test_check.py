"""The test of what was pruned on disk goes as far as memory goes, and finds out what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.surgery import check, stock_names
from excise.surgery.check import check_pruned, memory_needed
from excise.surgery.gguf import prune_gguf
from excise.surgery.on_disk import prune_folder
from tests.gguf_files import write_gguf
from tests.quantised import quantise
from tests.tiny import tiny_folder, tiny_model

REMOVED = [1]


@pytest.fixture
def little_memory(monkeypatch):
    """A machine on which not even the tiny models fit, and where loading one fails the test."""

    def refused(*_, **__):
        pytest.fail("a model was loaded that does not fit")

    monkeypatch.setattr(check, "free_everywhere", lambda: 1000)
    monkeypatch.setattr(check, "load", refused)


def test_logits_where_both_models_fit(tmp_path):
    source = tiny_folder(tmp_path / "model", "mixtral", layers=3)
    prune_folder(source, REMOVED, tmp_path / "out")
    report = check_pruned(source, REMOVED, tmp_path / "out")
    assert (report["level"], report["loads_in_stock_transformers"], report["cache_agrees"]) == ("generates", True, True)
    assert report["max_abs_logit_difference"] == 0


@pytest.mark.parametrize("form", ["modelopt", "fp8"])
def test_float8_is_compared_dequantised(form, tmp_path):
    source = quantise(
        tiny_folder(tmp_path / "model", "llama", layers=3, dtype=torch.bfloat16), form, keep=("layers.2.mlp",)
    )
    prune_folder(source, REMOVED, tmp_path / "out")
    report = check_pruned(source, REMOVED, tmp_path / "out")
    assert report["loads_in_stock_transformers"] is None
    assert (report["level"], report["cache_agrees"], report["max_abs_logit_difference"]) == ("generates", True, 0)
    wrong = check_pruned(source, [0], tmp_path / "out")
    assert not wrong["passed"]
    assert wrong["max_abs_logit_difference"] > 0.1


def test_gguf_is_loaded_by_transformers(tmp_path):
    write_gguf(tiny_model("llama", 3), tmp_path / "a.gguf")
    prune_gguf(tmp_path / "a.gguf", REMOVED, tmp_path / "out.gguf")
    report = check_pruned(tmp_path / "a.gguf", REMOVED, tmp_path / "out.gguf")
    assert (report["level"], report["loads_in_stock_transformers"], report["cache_agrees"]) == ("generates", True, True)
    assert report["max_abs_logit_difference"] == 0


def test_names_only_where_they_do_not_fit(little_memory, tmp_path):
    source = tiny_folder(tmp_path / "model", "mixtral", layers=3)
    prune_folder(source, REMOVED, tmp_path / "out")
    report = check_pruned(source, REMOVED, tmp_path / "out")
    assert (report["passed"], report["level"], report["loads_in_stock_transformers"]) == (True, "names", True)
    assert "GB of memory are free" in report["untested"]["logits"]


def test_names_that_are_wrong_are_told(tmp_path):
    folder = tiny_folder(tmp_path / "model", "llama", layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.9.x"] = weights.pop("model.layers.1.input_layernorm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = stock_names.main(str(folder))
    assert report["missing_keys"] == ["model.layers.1.input_layernorm.weight"]
    assert report["unexpected_keys"] == ["model.layers.9.x"]
    assert "lm_head.weight" in report["mismatched_keys"][0]


def test_names_of_float8_checkpoints(little_memory, tmp_path):
    source = quantise(tiny_folder(tmp_path / "model", "llama", layers=3), "modelopt")
    prune_folder(source, REMOVED, tmp_path / "out")
    report = check_pruned(source, REMOVED, tmp_path / "out")
    assert (report["passed"], report["level"], report["loads_in_stock_transformers"]) == (True, "names", None)


def test_a_gguf_file_that_is_too_large_is_read_back_and_no_more(little_memory, tmp_path):
    write_gguf(tiny_model("llama", 3), tmp_path / "a.gguf")
    prune_gguf(tmp_path / "a.gguf", REMOVED, tmp_path / "out.gguf")
    report = check_pruned(tmp_path / "a.gguf", REMOVED, tmp_path / "out.gguf")
    assert (report["passed"], report["level"]) == (True, "files")
    assert "GB of memory are free" in report["untested"]["logits"]


def test_a_packed_checkpoint_without_its_tool_is_pruned_and_said_to_be_untested(tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    settings = {"quant_method": "gptq", "bits": 4, "dataset": "c4", "group_size": 32}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    prune_folder(source, REMOVED, tmp_path / "out")
    report = check_pruned(source, REMOVED, tmp_path / "out")
    assert (report["passed"], report["level"]) == (True, "files")
    assert "not installed" in report["untested"]["logits"]


def test_an_original_that_does_not_load_leaves_its_pruned_model_to_be_compared_by_names(tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    prune_folder(source, REMOVED, tmp_path / "out")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = check_pruned(source, REMOVED, tmp_path / "out")
    assert (report["passed"], report["level"]) == (True, "names")
    assert "model.norm.weight" in report["untested"]["logits"]


def test_memory_needed_counts_parameters_in_float32(tmp_path):
    folder = tiny_folder(tmp_path / "model", "llama", layers=3, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in tiny_model("llama", 3).parameters())
    assert memory_needed(folder) == 4 * parameters
    write_gguf(tiny_model("llama", 3), tmp_path / "a.gguf")
    assert memory_needed(tmp_path / "a.gguf") == 4 * parameters
