"""Repair of several removals inside a run: kept on disk, told apart, and applied where it helps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from excise.context import Context
from excise.measuring.measure import measure
from excise.models.loading import load
from excise.progress import Progress
from excise.repair import repair
from excise.repair.refitted import Losses
from excise.repair.several import Repairs, repair_removals
from excise.store import Store
from tests.contexts import Shown, context_of
from tests.random_samples import random_samples
from tests.tiny import tiny_folder

SAMPLES, HELD_OUT = random_samples([16] * 30), random_samples([14] * 6, seed=1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("model"), "llama", layers=5, dtype=torch.bfloat16)))


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_can_be_repaired_is_and_the_rest_says_why(loaded, tmp_path):
    removals = [(1, 2), (0, 1), (3,), (0, 2)]
    repairs = repair_removals(Context(loaded, Store(tmp_path)), removals, SAMPLES, HELD_OUT, tokens=200)
    assert list(repairs.fitted) == removals
    # The cut that can be repaired is, and the other is left alone: block 1 makes up for the upper one.
    partly = repairs.fitted[(0, 2)]
    assert {step.run for step in partly.steps} == {(2,)}
    assert [alone["run"] for alone in partly.facts["left_alone"]] == [[0]]
    for removed in repairs.fitted:
        plain = measure(context_of(loaded.stack), HELD_OUT, [removed]).losses[0]
        state = copy_of(loaded.stack.model)
        with repairs.applied(loaded.stack, removed):
            after = measure(context_of(loaded.stack), HELD_OUT, [removed]).losses[0]
            changed = any(not torch.equal(v, state[name]) for name, v in loaded.stack.model.state_dict().items())
        assert after == min(plain, repairs.loss(removed))
        assert changed == (repairs.helpful(removed) is not None) == (repairs.loss(removed) < plain)
    assert repairs.fitted[(3,)].facts["samples"]["samples"] == 13


def test_what_cannot_be_repaired_says_why(tmp_path):
    loaded = load(str(tiny_folder(tmp_path, "gemma4_text", layers=6)))
    repairs = repair_removals(Context(loaded), [(2,)], SAMPLES, HELD_OUT, tokens=200)
    assert not repairs.fitted
    assert "keys and values of blocks below" in repairs.refused[(2,)]
    assert json.loads(json.dumps(repairs.describe()))["refused"][0]["removed"] == [2]
    assert repairs.loss((2,)) is None


def test_a_removal_that_overflows_costs_the_others_nothing(loaded, monkeypatch):
    plain = repair.student_streams

    def overflowing(stack, batch, start, state, removed, fold):
        before, found, stream = plain(stack, batch, start, state, removed, fold)
        return before, found, stream * torch.inf if 2 in removed else stream

    monkeypatch.setattr(repair, "student_streams", overflowing)
    repairs = repair_removals(context_of(loaded.stack), [(1,), (2,), (3,)], SAMPLES, HELD_OUT)
    assert list(repairs.fitted) == [(1,), (3,)]
    assert "block 1 overflows" in repairs.refused[(2,)]


def test_a_repair_that_cures_an_overflow_helps():
    assert Losses(1.0, torch.nan, 2.0).helps
    assert not Losses(1.0, 2.0, torch.nan).helps
    assert not Losses(1.0, torch.nan, torch.inf).helps


def test_finished_repairs_are_found_again_and_others_are_not_taken_for_them(loaded, tmp_path):
    shown = Shown()
    context = Context(loaded, Store(tmp_path), Progress(shown))
    first = repair_removals(context, [(1,)], SAMPLES, HELD_OUT)
    again = repair_removals(context, [(1,), (2,)], SAMPLES, HELD_OUT)
    assert again.fitted[(1,)].describe() == first.fitted[(1,)].describe()
    repair_removals(context, [(1,), (2,)], SAMPLES, HELD_OUT)
    repair_removals(context, [(1,)], SAMPLES[:20], HELD_OUT)
    passes = 3 * 480 + 3 * 84  # of calibration (the original, below and above the cut) and held-out samples
    assert shown.announced == [passes, passes, 0, 3 * 320 + 3 * 84]


def test_a_repair_that_does_not_help_is_not_applied(loaded):
    fitted = repair_removals(Context(loaded), [(1,)], SAMPLES, HELD_OUT).fitted[(1,)]
    state = copy_of(loaded.stack.model)
    for losses, helps in (
        (Losses(1.0, 2.0, 2.5), False),
        (Losses(1.0, 2.0, float("nan")), False),
        (None, False),
        (Losses(1.0, 2.0, 1.5), True),
    ):
        repairs = Repairs({(1,): replace(fitted, losses=losses)})
        assert (repairs.helpful((1,)) is not None) == helps
        with repairs.applied(loaded.stack, (1,)):
            assert all(torch.equal(v, state[name]) for name, v in loaded.stack.model.state_dict().items()) != helps
    assert Repairs().helpful((1,)) is None


def test_models_stored_quantised_single_samples_and_overflows_are_left_as_they_are(loaded, tmp_path):
    folder = tiny_folder(tmp_path / "model", "llama", layers=3)
    other = load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert "at least two" in repair_removals(Context(other), [(1,)], SAMPLES[:1], HELD_OUT).refused[(1,)]
    with torch.no_grad():
        other.stack.blocks[0].module.mlp.down_proj.weight.fill_(float("inf"))
    assert "not finite" in repair_removals(Context(other), [(1,)], SAMPLES, HELD_OUT).refused[(1,)]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "stored quantised" in repair_removals(Context(other), [(1,)], SAMPLES, HELD_OUT).refused[(1,)]
