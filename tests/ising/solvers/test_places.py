"""What remains keeps a pattern: every solver on random problems, against the naive definition."""

from __future__ import annotations

import numpy as np
import pytest

from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import make_solver, solve, solve_all
from excise.ising.solvers.branch_and_bound import BranchAndBound
from excise.ising.solvers.exhaustive import Exhaustive
from excise.ising.solvers.kernels import random_state
from excise.ising.solvers.places import open_states

from .problems import assert_same_list, every_state, matrix, pattern_of_kinds, random_pattern


@pytest.mark.parametrize("name", ["exhaustive", "branch-and-bound", "tabu", "annealing"])
def test_random_patterns_equal_the_naive_enumeration(name):
    compared = 0
    for seed in range(70):
        problem = random_pattern(seed)
        if problem is None:
            continue
        expected = every_state(problem)
        if not problem.constraints:
            assert problem.number_of_states() == len(expected)
        for states in (1, 5, 10_000):
            found = make_solver(name).solve(problem, states, seed=seed)
            assert all(problem.allows(state.removed) for state in found)
            assert found.certified == (name in ("exhaustive", "branch-and-bound"))
            if found.certified:
                assert_same_list(found, expected[:states], problem)
                assert found.complete == (states > len(expected))
            elif expected:
                assert found[0].energy == pytest.approx(expected[0][0], rel=1e-9, abs=1e-300)
        compared += 1
    assert compared > 45


def stack_like(blocks, period, budget, seed=0):
    """Blocks of which the last in every period is of another kind, with correlations of both signs."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((3 * blocks, blocks)) @ (rng.standard_normal((blocks, blocks)) / 3 + np.eye(blocks))
    kinds = ["b" if (i + 1) % period == 0 else "a" for i in range(blocks)]
    return Problem(Energy(None, A.T @ A / len(A)), budget, (0,), pattern=pattern_of_kinds(kinds, kinds[:period]))


@pytest.mark.parametrize(
    ("blocks", "period", "budget", "states"),
    [(24, 2, 6, 1140), (26, 6, 6, 651), (34, 6, 12, 214_396), (36, 2, 12, 475_020), (48, 4, 12, 680_766)],
)
def test_the_depths_of_released_models_are_proved_both_ways(blocks, period, budget, states):
    problem = stack_like(blocks, period, budget)
    assert problem.number_of_states() == states
    enumerated = Exhaustive().solve(problem, 50)
    assert enumerated.certified
    searched = BranchAndBound(restarts=3).solve(problem, 50)
    assert searched.certified
    assert_same_list(searched, [(s.energy, s.removed) for s in enumerated], problem)
    free = solve(Problem(problem.energy, budget, (0,)), states=1)
    assert free[0].energy <= enumerated[0].energy  # the pattern costs something, and never gains


def test_several_budgets_at_once():
    problem = stack_like(16, 2, 4)
    spectra = solve_all(problem, [2, 4, 5], states=5)
    for budget, spectrum in spectra.items():
        assert spectrum.certified
        alone = Exhaustive().solve(stack_like(16, 2, budget), 5)
        assert_same_list(spectrum, [(s.energy, s.removed) for s in alone], problem)


def test_an_enumeration_out_of_time_says_so():
    found = Exhaustive().solve(stack_like(48, 2, 16), 5, time_limit=1e-3)
    assert not found.certified
    assert "stopped before every state was visited" in found.notes[0]


def test_states_are_drawn_evenly():
    rng = np.random.default_rng(0)
    energy = Energy(None, matrix("psd", 8, rng))
    reduced = Problem(energy, 4, pattern=pattern_of_kinds("ab" * 4, "ab")).reduced()
    drawn = open_states(reduced, 6000, random_state(0))
    states, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(states) == 15  # two pairs of neighbours among four that stay: as many as ways to put 2 in 5 gaps
    assert counts.min() > 300
    assert counts.max() < 500
