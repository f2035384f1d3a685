"""Amounts to remove: shares and numbers of what units weigh, and what they leave open."""

import itertools

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import solve
from excise.ising.times import Latency, Request, Times
from excise.ising.weighing import Weights, weight_budget
from excise.settings import MILLISECONDS, Goal

SIZES = (1.0, 5.0, 2.0, 2.0, 7.0, 3.0)


@pytest.mark.parametrize(
    ("amount", "whole", "least"), [("50%", 20.0, 10.0), ("7", 20.0, 7.0), ("25%", 40.0, 10.0), (" 5 % ", 20.0, 1.0)]
)
def test_at_least_the_amount_and_at_most_the_heaviest_more(amount, whole, least):
    constraints = weight_budget(Weights(SIZES, whole), Goal(f"--remove-weight {amount}", "weight", amount))
    for removed in itertools.chain(*(itertools.combinations(range(6), m) for m in range(7))):
        weight = sum(SIZES[i] for i in removed)
        assert all(c.holds(removed) for c in constraints) == (least <= weight <= least + 7)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal("--remove-weight 21", "weight", "21"), r"stands for 21 of 40 weight.* have, 20, which is 50.0%. Ask"),
        (Goal("--remove-weight 0", "weight", "0"), "expected more than 0"),
        (Goal("--speedup 3.0", MILLISECONDS, "66.6%"), r"--speedup 3.0 .* 50.0% and makes it 2.00 times as fast"),
        (Goal("--remove-params x", "parameters", "x"), "--remove-params x expects a share such as 25%, or a number"),
    ],
)
def test_what_cannot_be_had_is_said_with_what_can(goal, message):
    with pytest.raises(InputError, match=message):
        weight_budget(Weights(SIZES, 40.0), goal)


def test_protected_units_do_not_count_among_what_may_go():
    goal = Goal("--remove-weight 14", "weight", "14")
    assert weight_budget(Weights(SIZES, 20.0), goal, (1,))
    with pytest.raises(InputError, match="go together have, 13"):
        weight_budget(Weights(SIZES, 20.0), goal, (-2,))


def times(seconds, **changes):
    """Times of blocks of one second of rest, tokens taking a tenth of the prompt."""
    blocks = tuple(Latency(s, s / 10) for s in seconds)
    whole = Latency(1 + sum(seconds), (1 + sum(seconds)) / 10)
    facts = {"model": "m", "model_hash": "a" * 64, "request": Request(8, 11), "whole": whole, "blocks": blocks}
    others = {"kinds": ("block",) * len(blocks), "turns": 5, "error": 0.0, "engine": "transformers"}
    others |= {"machine": {}, "provenance": {}}
    return Times(**{**facts, **others, **changes})


def test_a_request_is_its_prefill_and_every_token_after_the_first():
    found = times((1.0, 3.0))
    assert found.weights("prefill") == Weights((1000.0, 3000.0), 5000.0)
    assert found.weights("decode").whole == pytest.approx(500.0)
    assert found.weights("request").units == pytest.approx((2000.0, 6000.0))
    assert found.speedups(found.without((1,))) == pytest.approx({"request": 2.5, "prefill": 2.5, "decode": 2.5})


def test_times_are_read_back_and_are_those_of_one_model(tmp_path):
    found = times((1.0, 3.0))
    found.save(tmp_path / "times.json")
    assert Times.load(tmp_path / "times.json") == found
    assert found.of_model("a" * 64) is found
    with pytest.raises(InputError, match=r"times are those of m .* run `excise times` on that one"):
        found.of_model("b" * 64)


def test_a_prompt_leaves_room_for_the_answer():
    assert Request(512, 64).within(256) == Request(192, 64)
    assert Request(512, 64).within(None) == Request(512, 64).within(4096) == Request(512, 64)


def test_the_lowest_energy_of_those_fast_enough_is_proved():
    """The knapsack against a look at every removal, with blocks of unlike times."""
    generator = np.random.default_rng(3)
    J = generator.standard_normal((9, 9))
    energy = Energy(generator.standard_normal(9), J @ J.T)
    found = times(tuple(generator.choice([0.5, 2.0, 3.0], 9)))
    goal = Goal("--speedup 1.6", MILLISECONDS, f"{100 * (1 - 1 / 1.6)!r}%")
    weights = found.weights("request")
    problem = Problem(energy, None, constraints=weight_budget(weights, goal))
    spectrum = solve(problem, states=5, solver="branch-and-bound")
    removals = itertools.chain(*(itertools.combinations(range(9), m) for m in range(1, 10)))
    enough = [
        r
        for r in removals
        if found.speedups(found.without(r))["request"] >= 1.6
        and sum(weights.units[i] for i in r) <= weights.whole * (1 - 1 / 1.6) + max(weights.units)
    ]
    assert spectrum.certified
    assert len({len(r) for r in enough}) > 2
    assert [s.removed for s in spectrum] == sorted(enough, key=energy.energy)[:5]
