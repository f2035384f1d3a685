"""Healing inside a run: what it writes, the race that decides, resumption, and what is refused early."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from excise.choosing.judged import halves
from excise.data import split_samples
from excise.errors import InputError, OutputError
from excise.evaluation.panel.panel import Panel
from excise.healing.heal_stage import Healing
from excise.healing.settings import Settings
from excise.healing.teachers import OnlineTeacher
from excise.measuring.measure import measure
from excise.measuring.ratios import by_domain
from excise.models.loading import load
from excise.run import RunSettings, run
from excise.text import markdown_text
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import tiny_folder

SETTINGS = Settings(steps=4, batch=4, learning_rate=3e-3, warmup=0, save_every=1)
PLAIN = {"effort": 0, "rivals": (), "random_states": 3, "verify_states": 2, "states": 4}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("model"), "llama", layers=5)))


@pytest.fixture(scope="module")
def samples(loaded):
    split = split_samples("starter", loaded.tokenizer, samples=16, held_out=4, tokens=20, seed=0, loss_on="all")
    # Categories come from other people's files, and their names into tables.
    return tuple(replace(p, items=tuple(replace(s, category=f"{s.category}|<i>") for s in p)) for p in split)


def healing(loaded, **options):
    teacher, open_student = OnlineTeacher(loaded.stack), partial(load, dtype="float32")
    return Healing(SETTINGS, teacher, random_samples([12] * 8, seed=3), open_student, **options)


def run_in(out, loaded, samples, remove, *, healing=None, **options):
    """A run of a model in memory."""
    settings = RunSettings(model=loaded.source, remove=remove, out=out, **options)
    return run(loaded, *samples, settings, healing=healing)


@pytest.fixture(scope="module")
def healed(loaded, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return run_in(out, loaded, samples, 2, healing=healing(loaded), **PLAIN), out


def test_the_healed_model_stands_beside_the_pruned_one_with_its_losses(healed, samples):
    facts, out = healed
    assert json.loads((out / "run.json").read_text())["healed"] == facts.healed
    losses = facts.healed["losses"]
    assert losses["original"] == pytest.approx(facts.base_loss, abs=1e-6)
    assert losses["pruned"] == pytest.approx(facts.checkpoint_loss, abs=1e-5)
    written = load(str(out / facts.healed["checkpoint"]), dtype="float32")
    assert measure(context_of(written.stack), halves(samples[1])[1], [()]).losses[0] == pytest.approx(
        losses["healed"], abs=1e-5
    )
    assert losses["healed"] != losses["pruned"]
    judging = halves(samples[1])[1]
    found = measure(context_of(written.stack), judging, [()])
    assert facts.healed["domains"]["healed"] == pytest.approx(
        by_domain(found.of(), found.counts, judging.domains), abs=1e-5
    )
    card = (out / facts.healed["checkpoint"] / "README.md").read_text()
    kinds = sorted(set(judging.domains))
    assert len(kinds) > 1
    assert f"| model | held-out loss, nats/token | {' | '.join(map(markdown_text, kinds))} |" in card
    assert "|<i>" not in card
    assert facts.healed["steps"] == len(json.loads((out / "healed" / "heal.json").read_text())["curve"]) == 4
    assert json.loads((out / "healed" / "excise.json").read_text())["removed"] == list(facts.removed)
    assert facts.race is None
    assert not (out / "work" / "healing").exists()
    assert [model.healed for model in Panel.load(out / "panel.json").models] == [False, False, True]


def test_the_healed_model_passes_the_self_test_of_pruning(healed):
    facts, out = healed
    report = facts.healed["self_test"]
    assert report["loads_in_stock_transformers"]
    assert report["cache_agrees"]
    assert report["max_abs_logit_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(out / "healed")
    assert model.config.num_hidden_layers == 3


@pytest.fixture(scope="module")
def raced(loaded, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return run_in(out, loaded, samples, 2, healing=healing(loaded, race=3), panel=False, **PLAIN), out


def test_a_race_decides_what_is_removed_and_the_winner_is_healed(raced):
    facts, out = raced
    standings = facts.race["standings"]
    assert facts.selected_by == "race"
    assert list(facts.removed) == standings[0]["removed"]
    assert len({tuple(s["removed"]) for s in standings}) == 3
    assert [sorted(s["losses"]) for s in standings] == [["1", "2"], ["1", "2"], ["1"]]
    assert min(s["losses"]["2"] for s in standings[:2]) == standings[0]["losses"]["2"]
    best = {min(c.loss, c.repaired_loss or c.loss): c.removed for c in facts.candidates}
    assert sorted(s["removed"] for s in standings) == sorted(list(best[loss]) for loss in sorted(best)[:3])
    assert json.loads((out / "model" / "excise.json").read_text())["removed"] == list(facts.removed)
    assert facts.healed["losses"]["pruned"] == pytest.approx(facts.checkpoint_loss, abs=1e-5)
    assert {path.name for path in (out / "work").iterdir()}.isdisjoint({"entrants", "healing"})


class Stop(Exception):
    """What interrupts a run in these tests."""


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["race", "healing"])
def test_an_interrupted_run_heals_to_the_same_result(loaded, samples, raced, tmp_path, stop):
    (expected, _), steps = raced, []

    class Display:
        def __init__(self, interrupts):
            self.interrupts = interrupts

        def __enter__(self):
            return self.report

        def __exit__(self, *_):
            return False

        def report(self, progress, name):
            steps.append((name, progress.step))
            here, last = (name == "healing") == (stop == "healing"), 3 if stop == "healing" else 2
            if self.interrupts and here and progress.step == last:
                raise Stop

    def watched(interrupts):
        return healing(loaded, race=3, watch=lambda: Display(interrupts))

    with pytest.raises(Stop):
        run_in(tmp_path / "cut", loaded, samples, 2, healing=watched(True), **PLAIN)
    done = set(steps)
    steps.clear()
    facts = run_in(tmp_path / "cut", loaded, samples, 2, healing=watched(False), **PLAIN)
    assert len(done & set(steps)) == 1  # the step that was interrupted before its checkpoint
    assert facts.removed == expected.removed
    assert facts.race["standings"][0]["losses"] == pytest.approx(expected.race["standings"][0]["losses"], abs=1e-6)
    assert facts.healed["losses"] == pytest.approx(expected.healed["losses"], abs=1e-6)


@pytest.mark.slow
def test_a_new_run_in_its_place_leaves_no_healed_model_of_the_old_one(loaded, samples, healed, tmp_path):
    out = tmp_path / "run"
    run_in(out, loaded, samples, 1, healing=healing(loaded), **PLAIN)
    assert (out / "healed").exists()
    facts = run_in(out, loaded, samples, 2, force=True, **PLAIN)
    assert facts.healed is None
    assert not (out / "healed").exists()


def test_what_training_would_refuse_late_is_refused_before_anything_is_measured(loaded, samples, tmp_path):
    few = Healing(SETTINGS, OnlineTeacher(loaded.stack), random_samples([12] * 3), partial(load, dtype="float32"))
    with pytest.raises(InputError, match="at least one batch of 4 samples"):
        run_in(tmp_path / "a", loaded, samples, 2, healing=few, **PLAIN)
    with pytest.raises(InputError, match="at least 8 steps"):
        run_in(tmp_path / "b", loaded, samples, 2, healing=healing(loaded, race=5), **PLAIN)
    (tmp_path / "c" / "work").mkdir(parents=True)
    (tmp_path / "c" / "healed").mkdir()
    (tmp_path / "c" / "healed" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not written by excise"):
        run_in(tmp_path / "c", loaded, samples, 2, healing=healing(loaded), **PLAIN)
    assert not any((tmp_path / name / "gradients.safetensors").exists() for name in "abc")


def test_healing_leaves_the_original_in_memory_as_it_was(loaded, samples, healed):
    again = load(loaded.source)
    for name, value in again.stack.model.state_dict().items():
        assert torch.equal(value, loaded.stack.model.state_dict()[name])
