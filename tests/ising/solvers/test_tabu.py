import numpy as np
import pytest

from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most, weigh_at_least
from excise.ising.solvers.exhaustive import Exhaustive
from excise.ising.solvers.tabu import Tabu


def gradient_energy(n, seed):
    A = np.random.default_rng(seed).standard_normal((2 * n, n)) @ np.random.default_rng(seed + 1).standard_normal(
        (n, n)
    )
    return Energy(None, A.T @ A / len(A))


@pytest.mark.parametrize("seed", range(12))
def test_finds_the_twenty_lowest_of_small_problems(seed):
    problem = Problem(gradient_energy(14, seed), budget=3 + seed % 9, protected=(0,), forced=(5,))
    assert [s.removed for s in Tabu().solve(problem)] == [s.removed for s in Exhaustive().solve(problem)]


def test_every_state_keeps_the_magnetisation_and_is_allowed():
    constraints = (weigh_at_least(range(16), 50), at_most(range(8), 3, 16))
    problem = Problem(gradient_energy(16, 3), 6, protected=(2,), forced=(9,), constraints=constraints)
    spectrum = Tabu(restarts=20).solve(problem, 200)
    assert len(spectrum) == 200
    assert all(problem.allows(state.removed) for state in spectrum)
    assert [s.removed for s in spectrum][:5] == [s.removed for s in Exhaustive().solve(problem, 5)]


def test_seed_fixes_the_result_and_nothing_is_certified():
    J = np.random.default_rng(0).standard_normal((90, 90))
    problem = Problem(Energy(None, J + J.T), 40)
    first, second = (Tabu(restarts=1, patience=0).solve(problem, 50, seed=7) for _ in range(2))
    assert first.states == second.states
    assert first.states != Tabu(restarts=1, patience=0).solve(problem, 50, seed=8).states
    assert not first.certified
    assert first.lower_bound is None


def test_a_small_problem_is_exhausted():
    spectrum = Tabu().solve(Problem(gradient_energy(6, 0), 3), 100)
    assert len(spectrum) == 20
    assert spectrum.complete
