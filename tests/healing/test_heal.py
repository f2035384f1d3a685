"""The verb from end to end on a tiny model: the folder, its evidence, a recorded teacher, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from excise.artefacts import read_json
from excise.measuring.measure import measure
from excise.models.loading import load
from tests.contexts import context_of
from tests.svg_files import Figure
from tests.tiny import tiny_folder

QUICK = ("--samples", 30, "--tokens", 24, "--held-out", 0.2, "--steps", 4, "--batch", 4, "--lr", 3e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heal")


@pytest.fixture
def models(folder, excise):
    original, pruned = folder / "original", folder / "pruned"
    if not pruned.exists():
        tiny_folder(original, "llama", layers=4, dtype=torch.bfloat16)
        assert excise("prune", original, "--removed", "1-2", "--out", pruned, "--no-self-test")[0] == 0
    return original, pruned


def test_heal_writes_a_checkpoint_with_its_evidence(excise, models, tmp_path):
    original, pruned = models
    out = tmp_path / "healed"
    code, text, _ = excise("heal", pruned, "--teacher", original, "--out", out, *QUICK, "--hidden", 0.1, "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["self_test"]["loads_in_stock_transformers"]
    assert facts["self_test"]["cache_agrees"]
    curve = [entry["loss"] for entry in facts["curve"]]
    assert sum(curve[2:]) < sum(curve[:2])
    assert facts["losses"]["healed"] != facts["losses"]["pruned"]
    assert len(facts["curve"]) == facts["steps"] == 4
    assert {key: value for key, value in facts.items() if key != "out"} == read_json(out / "heal.json")
    figure = Figure(out / "loss.svg")
    assert len(figure.marked("curve")[0].get("points").split()) == 4
    assert f"healed {facts['losses']['healed']:.3f}" in figure.texts[-1]
    assert not list(tmp_path.glob(".*work*"))
    recipe, before = (json.loads((place / "excise.json").read_text()) for place in (out, pruned))
    assert recipe["removed"] == before["removed"] == [1, 2]
    assert recipe["original_blocks"] == [0, 3]
    assert recipe["healing"]["steps"] == 4
    card = (out / "README.md").read_text()
    assert "then healed" in card
    assert "## Healing" in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert tokenizer.chat_template
    code, _, err = excise("heal", pruned, "--teacher", original, "--out", out, *QUICK)
    assert code == 2
    assert "--force" in err


def test_a_recording_needs_no_teacher_the_second_time(excise, models, tmp_path):
    original, pruned = models
    recorded = ("--offline", tmp_path / "recorded", "--top-k", 40)
    code, _, err = excise("heal", pruned, "--out", tmp_path / "a", *recorded, *QUICK)
    assert code == 2
    assert "pass --teacher" in err
    assert excise("heal", pruned, "--out", tmp_path / "a", "--teacher", original, *recorded, *QUICK)[0] == 0
    assert excise("heal", pruned, "--out", tmp_path / "b", *recorded, *QUICK, "--train", "lora")[0] == 0
    index = json.loads((tmp_path / "recorded" / "teacher.json").read_text())
    assert index["k"] == 40
    assert 0.3 < index["kept_mass"] < 1
    facts = [json.loads((tmp_path / name / "heal.json").read_text()) for name in "ab"]
    assert facts[0]["teacher"]["kind"] == facts[1]["teacher"]["kind"] == "offline"
    assert facts[0]["curve"][0]["loss"] == pytest.approx(facts[1]["curve"][0]["loss"], rel=1e-4)


@pytest.mark.parametrize("data", ["self", "self@0.8=starter", "starter:1,self:1"])
def test_a_race_is_not_run_on_the_words_of_one_of_its_entrants(excise, models, tmp_path, data):
    original, pruned = models
    command = ("heal", pruned, pruned, "--teacher", original, "--out", tmp_path / "out", "--data", data)
    code, _, err = excise(*command, *QUICK)
    assert code == 2
    assert "are the words of a pruned model, and 2 race" in err
    assert not list(tmp_path.iterdir())


def test_several_race_and_the_winner_is_healed(excise, models, tmp_path):
    original, pruned = models
    other = tmp_path / "other"
    assert excise("prune", original, "--removed", "2", "--out", other, "--no-self-test")[0] == 0
    code, text, _ = excise("heal", pruned, other, "--teacher", original, "--out", tmp_path / "out", *QUICK, "--json")
    assert code == 0
    facts = json.loads(text)
    standings = facts["race"]["standings"]
    assert {s["student"] for s in standings} == {str(pruned), str(other)}
    assert standings[0]["losses"]["2"] <= standings[1]["losses"]["2"]
    assert facts["student"] == standings[0]["student"]
    assert facts["race"]["steps_trained"] == 4
    # Of the samples held out, half chose the winner and half tell of it.
    assert (facts["samples"]["samples"], facts["held_out"]["samples"]) == (24, 3)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_the_loss_it_reports_is_that_of_the_checkpoint_it_wrote(excise, models, tmp_path):
    from excise.data import load_samples

    original, pruned = models
    out = tmp_path / "healed"
    assert excise("heal", pruned, "--teacher", original, "--out", out, *QUICK, "--train", "cuts")[0] == 0
    facts = json.loads((out / "heal.json").read_text())
    for place, name in ((original, "original"), (pruned, "pruned"), (out, "healed")):
        loaded = load(str(place), dtype="float32")
        held_out = load_samples("starter", loaded.tokenizer, samples=30, tokens=24, seed=0)[24:]
        assert held_out.hash == facts["held_out"]["hash"]
        loss = measure(context_of(loaded.stack), held_out, [()]).loss()
        assert facts["losses"][name] == pytest.approx(loss, abs=2e-2 if name == "healed" else 1e-5)  # bfloat16 on disk


def test_mistakes_are_named(excise, models, tmp_path):
    original, pruned = models
    (tmp_path / "thesis.txt").write_text("years of work")
    for arguments, message in (
        ((pruned, "--out", tmp_path / "a"), "expected --teacher ORIGINAL"),
        ((pruned, "--out", pruned, "--teacher", original), "is what is being read"),
        ((pruned, "--out", tmp_path, "--teacher", original), "not written by excise"),
        ((pruned, "--out", tmp_path / "a", "--teacher", original, "--preset", "big"), "expected --preset in small"),
        ((pruned, "--out", tmp_path / "a", "--teacher", original, "--lr", 0), "--lr (learning_rate) expects"),
        ((pruned, "--out", tmp_path / "a", "--teacher", original, *QUICK, "--held-out", 1.5), "--held-out expects"),
    ):
        code, _, err = excise("heal", *arguments)
        assert code == 2
        assert message in err
    other = tiny_folder(tmp_path / "other", "llama", layers=2, vocab_size=320)
    code, _, err = excise("heal", pruned, "--out", tmp_path / "a", "--teacher", other, *QUICK)
    assert code == 2
    assert "predicts 288 tokens and the teacher 320" in err


@pytest.mark.slow
def test_two_processes_heal_to_the_checkpoint_of_one(models, tmp_path):
    original, pruned = models
    facts, weights = {}, {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = ["-m", "excise", "heal", pruned, "--teacher", original, "--out", out, *QUICK]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([*launcher, *map(str, command)], env=environment, check=True, timeout=500)
        facts[processes] = json.loads((out / "heal.json").read_text())
        weights[processes] = load_file(out / "model.safetensors")
    losses = [[entry["loss"] for entry in facts[n]["curve"]] for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert facts[2]["losses"] == pytest.approx(facts[1]["losses"], rel=1e-5)
    assert facts[2]["self_test"]["loads_in_stock_transformers"]
    for name, value in weights[1].items():  # stored in bfloat16
        torch.testing.assert_close(weights[2][name].float(), value.float(), rtol=2**-7, atol=1e-4)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("verb", [("heal", "--teacher", "none"), ("run", "--remove", 2)])
def test_a_tracker_that_cannot_be_had_is_refused_before_anything_is_loaded(verb, excise, tmp_path):
    flag = "--report-to" if verb[0] == "heal" else "--heal-report-to"
    status, _, error = excise(verb[0], tmp_path / "no-model", *verb[1:], "--out", tmp_path / "out", flag, "tensorbord")
    assert status == 2
    assert "expected trackers among" in error
    assert "got 'tensorbord'" in error
