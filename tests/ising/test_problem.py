import itertools

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.pattern import Pattern
from excise.ising.problem import Constraint, Problem, at_most, weigh_at_least, weigh_at_most


def energy_of(n=6, seed=0):
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((n, n))
    return Energy(rng.standard_normal(n), J + J.T)


def test_negative_indices_count_from_the_end_and_repeats_merge():
    problem = Problem(energy_of(), 3, protected=(0, -1, 5), forced=(-3,))
    assert problem.protected == (0, 5)
    assert problem.forced == (3,)
    assert problem.free == (1, 2, 4)
    assert problem.number_of_states() == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "between 1 and 6"),
        ({"budget": 7}, "between 1 and 6"),
        ({"budget": 2.5}, "whole number"),
        ({"budget": 6, "protected": (1,)}, "between 1 and 5"),
        ({"budget": 1, "protected": range(6)}, "all 6 units are protected"),
        ({"budget": 2, "forced": (0, 1, 2)}, "3 units are forced"),
        ({"budget": 2, "protected": (1, 2), "forced": (2,)}, "unit 2 is both"),
        ({"budget": 2, "protected": (6,)}, "out of range"),
        ({"budget": 2, "forced": (-7,)}, "out of range"),
    ],
)
def test_impossible_problems_say_why(arguments, message):
    with pytest.raises(InputError, match=message):
        Problem(energy_of(), **arguments)


def test_reduced_problem_has_the_energies_of_the_whole():
    energy = energy_of()
    weights = weigh_at_least([1, 2, 3, 4, 5, 6], 9)
    problem = Problem(energy, 4, protected=(2,), forced=(0, 5), constraints=(weights,))
    reduced = problem.reduced()
    assert reduced.count == 2
    for chosen in itertools.combinations(range(3), 2):
        x = np.zeros(3)
        x[list(chosen)] = 1
        removed = reduced.removed(chosen)
        value = reduced.constant + reduced.h @ x + x @ reduced.J @ x
        assert value == pytest.approx(energy.energy(removed), abs=1e-12)
        assert bool((reduced.C @ x >= reduced.bounds).all()) == weights.holds(removed)


def test_allows_is_membership():
    problem = Problem(energy_of(), 2, protected=(0,), forced=(1,), constraints=(at_most([2, 3], 0, 6),))
    assert problem.allows((1, 4))
    for removed in [(1,), (1, 0), (4, 5), (1, 3), (1, 4, 5)]:
        assert not problem.allows(removed)


def test_without_a_budget_the_constraints_say_how_many():
    problem = Problem(energy_of(), None, constraints=(weigh_at_least([1, 1, 1, 3, 3, 3], 5), at_most([3, 4, 5], 1, 6)))
    assert problem.counts() == [2, 3, 4]
    with pytest.raises(InputError, match="no budget"):
        problem.reduced()
    assert problem.reduced(3).count == 3


def test_clashing_constraints_are_named_and_innocent_ones_are_not():
    heavy = weigh_at_least([1, 1, 1, 3, 3, 3], 9, name="parameters ≥ 9")
    few = at_most([3, 4, 5], 1, 6, name="at most 1 moe")
    innocent = at_most([0], 1, 6, name="innocent")
    with pytest.raises(InputError, match=r"parameters ≥ 9 and at most 1 moe with budget 3") as caught:
        Problem(energy_of(), 3, constraints=(innocent, heavy, few))
    assert "innocent" not in str(caught.value)


def test_a_single_impossible_constraint_is_named():
    with pytest.raises(InputError, match=r"weight removed ≥ 100"):
        Problem(energy_of(), 3, constraints=(weigh_at_least([1.0] * 6, 100),))
    with pytest.raises(InputError, match="expected 6 weights"):
        Problem(energy_of(), 3, constraints=(weigh_at_least([1.0] * 5, 1),))
    with pytest.raises(InputError, match="finite"):
        weigh_at_least([1.0, np.nan], 1)


def test_large_integer_weights_are_exact():
    weights = (2**40, 2**40 + 1, 3)
    assert Constraint(weights, 2**41 + 1).holds((0, 1))
    assert not Constraint(weights, 2**41 + 1 + 10**4).holds((0, 1))


def test_weights_between_two_bounds():
    weights = [1, 1, 1, 3, 3, 3]
    problem = Problem(energy_of(), None, constraints=(weigh_at_least(weights, 5), weigh_at_most(weights, 6)))
    assert problem.counts() == [2, 3, 4]
    assert problem.allows((0, 1, 3))
    assert not problem.allows((3, 4, 0))
    with pytest.raises(InputError, match=r"removed ≥ 5 and weight removed ≤ 4"):
        Problem(energy_of(), None, constraints=(weigh_at_least(weights, 5), weigh_at_most(weights, 4)))


ALTERNATING = Pattern(((True, False), (False, True)) * 3, name="the pattern of a reader")


def test_what_stays_keeps_the_pattern():
    problem = Problem(energy_of(), 2, pattern=ALTERNATING)
    assert problem.allows((1, 2))
    assert problem.allows((0, 5)) is False
    assert problem.number_of_states() == 5
    assert Problem(energy_of(), 1, pattern=ALTERNATING).number_of_states() == 1  # the last
    assert Problem(energy_of(), None, pattern=ALTERNATING).counts() == [1, 2, 3, 4, 5, 6]
    assert Problem(energy_of(), None, protected=(0,), forced=(1,), pattern=ALTERNATING).counts() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 1, "protected": (5,)}, "nothing that remains keeps the pattern of a reader with budget 1 and 1"),
        ({"budget": 2, "protected": (1,), "forced": (0,)}, "nothing that remains keeps"),
        ({"budget": 3, "protected": (1, 4, 5), "forced": (0, 2, 3)}, "nothing that remains keeps"),
        ({"budget": 2, "pattern": Pattern(((True,),) * 5)}, "pattern: expected places of 6 units, got 5"),
    ],
)
def test_patterns_that_cannot_be_kept_say_why(arguments, message):
    with pytest.raises(InputError, match=message):
        Problem(energy_of(), **{"pattern": ALTERNATING, **arguments})


def test_a_pattern_has_as_many_places_for_every_unit():
    for allowed in ((), ((),), ((True,), (True, False))):
        with pytest.raises(InputError, match="as many places"):
            Pattern(allowed)


def test_two_patterns_are_kept_together():
    thirds = Pattern(((True, True, False), (True, True, False), (False, False, True)) * 2)
    both = ALTERNATING.both(thirds)
    assert both.period == 6
    for removed in ((), (1, 2), (5,), (0, 1, 2), (3, 4, 5), (4, 5)):
        assert both.holds(removed) == (ALTERNATING.holds(removed) and thirds.holds(removed))
