import itertools

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most, weigh_at_least
from excise.ising.solvers import solve
from excise.ising.solvers.exhaustive import Exhaustive


def every_state(problem):
    n = len(problem.energy)
    subsets = (c for m in problem.counts() for c in itertools.combinations(range(n), m))
    return sorted((problem.energy.energy(units), units) for units in subsets if problem.allows(units))


def random_problem(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 15))
    J = rng.standard_normal((n, n))
    energy = Energy(rng.standard_normal(n) * rng.integers(0, 2), J + J.T)
    units = rng.permutation(n)
    fixed = int(rng.integers(0, max(1, n // 2)))
    protected, forced = units[: fixed // 2], units[fixed // 2 : fixed]
    budget = int(rng.integers(max(1, len(forced)), n - len(protected) + 1))
    return Problem(energy, budget, tuple(protected), tuple(forced))


@pytest.mark.parametrize("seed", range(60))
def test_equals_itertools(seed):
    problem = random_problem(seed)
    expected = every_state(problem)
    for states in (1, 7, len(expected) + 5):
        spectrum = Exhaustive().solve(problem, states)
        assert [(s.energy, s.removed) for s in spectrum] == expected[:states]
        assert spectrum.certified
        assert spectrum.complete == (states > len(expected))


@pytest.mark.parametrize("budget", [3, None])
def test_constraints_equal_itertools(budget):
    rng = np.random.default_rng(5)
    J = rng.standard_normal((9, 9))
    constraints = (weigh_at_least(rng.integers(1, 9, 9), 14), at_most([0, 1, 2, 3], 2, 9))
    problem = Problem(Energy(rng.standard_normal(9), J @ J.T), budget, forced=(4,), constraints=constraints)
    expected = every_state(problem)
    spectrum = Exhaustive().solve(problem, 11)
    assert [(s.energy, s.removed) for s in spectrum] == expected[:11]


def test_ties_come_in_lexicographic_order():
    spectrum = Exhaustive().solve(Problem(Energy(None, np.zeros((5, 5))), 2), 100)
    assert [s.removed for s in spectrum] == list(itertools.combinations(range(5), 2))


def test_too_many_states_are_refused_with_their_number():
    with pytest.raises(InputError, match=r"1\.18e\+17 states"):
        solve(Problem(Energy(None, np.eye(60)), 30), solver="exhaustive")


def test_out_of_time_is_not_certified():
    J = np.random.default_rng(0).standard_normal((40, 40))
    spectrum = Exhaustive(limit=10**12).solve(Problem(Energy(None, J + J.T), 20), 3, time_limit=0.05)
    assert not spectrum.certified
    assert "stopped" in spectrum.notes[0]
