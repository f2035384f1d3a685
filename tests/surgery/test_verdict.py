"""Levels of proof: what was proved, what could not be tested and why, and what failed and is not written."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.errors import SelfTestError
from excise.surgery.verdict import judged, publish
from tests.tiny import tiny_folder, tiny_tokenizer

GOOD = {
    "level": "logits",
    "missing_keys": [],
    "unexpected_keys": [],
    "mismatched_keys": [],
    "max_abs_logit_difference": 1e-6,
    "max_abs_logit": 9.0,
    "cache_agrees": True,
    "tokenizer_loads": True,
}
# What a report says beyond a good one → what failed, what was not tested (both as patterns; None for nothing).
REPORTS = {
    "good": ({}, None, None),
    "no tokenizer": ({"tokenizer_loads": None}, None, None),
    "tokenizer broken": ({"tokenizer_loads": False, "tokenizer_reason": "X"}, "tokenizer does not load: X", None),
    "other logits": ({"max_abs_logit_difference": 0.2}, "logits differ by 0.2", None),
    "rounded weights": ({"max_abs_logit_difference": 0.2, "tolerance": 5e-2}, None, None),
    "rounded too far": ({"max_abs_logit_difference": 0.9, "tolerance": 5e-2}, "logits differ by 0.9", None),
    "not a number": ({"max_abs_logit_difference": math.nan}, "not finite", None),
    "original not a number": ({"max_abs_logit": math.nan}, "not finite", None),
    "infinite": ({"max_abs_logit_difference": math.inf}, "not finite", None),
    "weight missing": ({"missing_keys": ["a"]}, "misses 1 weights \\(first: a\\)", None),
    "weight unknown": ({"unexpected_keys": ["a", "b"]}, "does not know 2 weights", None),
    "shape wrong": ({"mismatched_keys": ["a"]}, "has other shapes for 1", None),
    "cache wrong": ({"cache_agrees": False, "original_cache_agrees": True}, "with and without cache, where", None),
    "cache never right": (
        {"cache_agrees": False, "original_cache_agrees": False}, None, "the original itself differs",
    ),
    "cannot generate": ({"cache_agrees": None, "generation_reason": "ValueError: no"}, None, "generation: ValueError"),
    "names only": ({"level": "names", "reason": "2 GB are free"}, None, "2 GB are free"),
    "nothing": ({"level": "none", "reason": "gptq is not installed"}, None, "gptq is not installed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_is_judged(kind):
    said, failure, untested = REPORTS[kind]
    verdict = judged({**GOOD, **said})
    assert verdict["passed"] == (failure is None)
    for expected, found in ((failure, verdict["failures"]), (untested, verdict["untested"])):
        assert len(found) == (expected is not None)
        assert not expected or re.search(expected, found[0])


def test_what_failed_never_gets_its_name_and_what_was_there_stays(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("the one before")

    def write(place):
        place.mkdir()
        (place / "config.json").write_text("a new one")
        return {"removed": [1]}

    with pytest.raises(SelfTestError, match="out fails its self-test and was not written: logits are not finite"):
        publish(out, write, lambda place: {**GOOD, "max_abs_logit_difference": math.nan})
    assert (out / "config.json").read_text() == "the one before"
    seen = []
    recipe = publish(out, write, lambda place: seen.append((place / "config.json").read_text()) or GOOD)
    assert seen == ["a new one"]
    assert recipe["self_test"]["passed"]
    assert (out / "config.json").read_text() == "a new one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def _generation(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, **settings}))


def _without_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_another_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights.pop("lm_head.weight")[:2].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Inputs that cannot be tested in full, or could not be before: model type, its settings, what is done to the folder,
# and what the warning says (None where all is tested).
UNTESTABLE = {
    "no tokenizer": ("llama", {}, _without_tokenizer, None),
    "stop strings": ("llama", {}, lambda folder: _generation(folder, stop_strings=["</s>"]), None),
    "beams": ("llama", {}, lambda folder: _generation(folder, num_beams=4, length_penalty=2.0), None),
    "forced tokens": ("llama", {}, lambda folder: _generation(folder, forced_bos_token_id=5, max_length=3), None),
    "20 positions": ("gpt2", {"n_positions": 20}, None, None),
    "8 positions": ("opt", {"max_position_embeddings": 8}, None, None),
    "no head": ("llama", {}, _without_head, "no language-model head"),
    "another head": ("llama", {}, _with_another_head, "no language-model head but another"),
}


@pytest.mark.parametrize("kind", UNTESTABLE)
def test_what_cannot_be_tested_is_written_with_a_word(kind, excise, tmp_path):
    model_type, settings, change, reason = UNTESTABLE[kind]
    source = tiny_folder(tmp_path / "model", model_type, layers=4, **settings)
    if change:
        change(source)
    code, out, err = excise("prune", source, "--removed", "1", "--out", tmp_path / "out", "--json")
    assert code == 0
    report = json.loads(out)["self_test"]
    assert report["passed"]
    assert report["level"] == ("logits" if reason is None else "names")
    assert json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("was not tested in full" in err) == (reason is not None)
    assert not reason or reason in err


def _nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _overflowing(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("change", [_nan, _overflowing], ids=["NaN", "overflow"])
@pytest.mark.parametrize("way", [(), ("--merge", "figure"), ("--removed-sublayers", "3.attention")], ids=str)
def test_what_fails_exits_1_and_leaves_nothing(change, way, excise, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=4)
    change(source)
    code, _, err = excise("prune", source, "--removed", "1", "--out", tmp_path / "out", *way)
    assert code == 1
    assert "fails its self-test and was not written: logits are not finite" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert excise("prune", source, "--removed", "1", "--out", tmp_path / "out", *way, "--no-self-test")[0] == 0


def test_a_tokenizer_that_never_loaded_stops_before_anything_is_written(excise, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=4)
    assert tiny_tokenizer() is not None
    _broken_tokenizer(source)
    code, _, err = excise("prune", source, "--removed", "1", "--out", tmp_path / "out")
    assert code in (1, 2)
    assert "error: " in err
    assert not (tmp_path / "out").exists()
