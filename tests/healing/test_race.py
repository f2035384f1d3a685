"""The race: who wins, what it costs, that it resumes, and that the winner goes on as if it had been alone."""

from __future__ import annotations

import pytest
import torch

from excise.errors import InputError
from excise.healing.heal import heal, recipe_of
from excise.healing.race import race, rungs_of
from excise.healing.settings import Settings
from excise.healing.teachers import OnlineTeacher
from excise.healing.trainer import Origin, train
from excise.measuring.measure import measure
from excise.models.loading import load
from excise.store import Store
from excise.surgery.checkpoint import write_pruned
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import tiny_folder

REMOVALS = ((1,), (2,), (1, 2))
SETTINGS = Settings(steps=8, batch=4, learning_rate=3e-3, warmup=0, save_every=100)
SAMPLES, HELD_OUT = random_samples([9] * 8), random_samples([9] * 4, seed=1)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """A teacher and three pruned models of it."""
    folder = tmp_path_factory.mktemp("race")
    loaded = load(str(tiny_folder(folder / "original", "llama", layers=4)))
    students = []
    for number, removed in enumerate(REMOVALS):
        students.append(str(folder / f"pruned-{number}"))
        write_pruned(loaded.stack, removed, students[-1], tokenizer=loaded.tokenizer)
    return OnlineTeacher(loaded.stack), students


def test_the_worse_half_is_dropped_at_every_rung(field, tmp_path):
    teacher, students = field
    seen = []
    result = race(
        students,
        teacher,
        SAMPLES,
        HELD_OUT,
        Store(tmp_path),
        SETTINGS,
        report=lambda name, p: seen.append((name, p.step)),
    )
    first = {s.student: s.losses[2] for s in result.standings}
    ahead = sorted(first, key=first.get)[:2]
    assert {s.student for s in result.standings[:2]} == set(ahead)
    assert [sorted(s.losses) for s in result.standings] == [[2, 4], [2, 4], [2]]
    assert result.standings[0].losses[4] <= result.standings[1].losses[4]
    assert result.steps_trained == len(seen) == 2 * 3 + 2 * 2
    assert [name for name, step in seen if step <= 2] == [s for s in students for _ in range(2)]
    again = race(students, teacher, SAMPLES, HELD_OUT, Store(tmp_path), SETTINGS, report=lambda *_: seen.append(None))
    assert again == result
    assert None not in seen
    seen.clear()
    fewer = race(
        students[:2], teacher, SAMPLES, HELD_OUT, Store(tmp_path), SETTINGS, report=lambda *_: seen.append(None)
    )
    assert len(fewer.standings) == 2  # another race in the same folder; their trainings go on


def test_an_interrupted_race_ends_the_same_and_the_winner_goes_on_as_if_alone(field, tmp_path):
    teacher, students = field
    pair, whole = students[:2], tmp_path / "whole"
    expected = race(pair, teacher, SAMPLES, HELD_OUT, Store(whole), SETTINGS)
    losses = {s.student: s.losses for s in expected.standings}

    def stop(name, progress):
        if name == pair[1] and progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race(pair, teacher, SAMPLES, HELD_OUT, Store(tmp_path / "cut"), SETTINGS, report=stop)
    resumed = race(pair, teacher, SAMPLES, HELD_OUT, Store(tmp_path / "cut"), SETTINGS)
    for standing in resumed.standings:
        assert standing.losses == pytest.approx(losses[standing.student], abs=1e-6)
    assert resumed.winner.student == expected.winner.student

    winner = load(resumed.winner.student, dtype="float32")
    facts = heal(winner, teacher, SAMPLES, HELD_OUT, tmp_path / "out", SETTINGS, store=Store(tmp_path / "cut"))
    alone = load(resumed.winner.student, dtype="float32")
    origin = Origin.of(recipe_of(resumed.winner.student))
    curve = train(alone.stack, teacher, SAMPLES, tmp_path / "alone", SETTINGS, origin=origin)
    assert [e["loss"] for e in facts["curve"]] == pytest.approx([e["loss"] for e in curve], abs=1e-6)
    assert facts["losses"]["healed"] == pytest.approx(measure(context_of(alone.stack), HELD_OUT, [()]).loss(), abs=1e-6)


def test_an_entrant_that_is_confused_comes_last(field, tmp_path):
    teacher, students = field

    def open_student(name):
        loaded = load(name, dtype="float32")
        if name == students[0]:
            with torch.no_grad():
                loaded.stack.model.model.norm.weight.mul_(1e4)  # confident nonsense
        return loaded

    result = race(students[:2], teacher, SAMPLES, HELD_OUT, Store(tmp_path), SETTINGS, open_student=open_student)
    assert result.winner.student == students[1]


def test_rungs_and_what_makes_no_race(field, tmp_path):
    teacher, students = field
    assert rungs_of(2, 10) == (5,)
    assert rungs_of(5, 80) == (10, 20, 40)
    with pytest.raises(InputError, match="at least 8 steps"):
        rungs_of(5, 7)
    for entrants in (students[:1], [students[0], students[0]]):
        with pytest.raises(InputError, match="at least two different checkpoints"):
            race(entrants, teacher, SAMPLES, HELD_OUT, Store(tmp_path), SETTINGS)
