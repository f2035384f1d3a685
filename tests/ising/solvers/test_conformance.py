"""Every solver on every problem of the table. A new solver adds one line."""

import pytest

from excise.ising.solvers.annealing import Annealing
from excise.ising.solvers.branch_and_bound import BranchAndBound
from excise.ising.solvers.exhaustive import Exhaustive
from excise.ising.solvers.tabu import Tabu

from .problems import assert_same_list, every_state, table

PROBLEMS = table()
SOLVERS = {
    "exhaustive": (Exhaustive(), True),
    "branch-and-bound": (BranchAndBound(restarts=3), True),
    "branch-and-bound, one thread": (BranchAndBound(restarts=1, threads=1), True),
    "tabu": (Tabu(restarts=20), False),
    "annealing": (Annealing(restarts=10, sweeps=100), False),
}


@pytest.mark.parametrize("problem_name", PROBLEMS)
@pytest.mark.parametrize("solver_name", SOLVERS)
def test_conformance(solver_name, problem_name):
    problem = PROBLEMS[problem_name]
    solver, exact = SOLVERS[solver_name]
    expected = every_state(problem)
    for states in (1, 6, 10_000):
        spectrum = solver.solve(problem, states, seed=3)
        assert all(problem.allows(state.removed) for state in spectrum)
        assert [s.energy for s in spectrum] == [problem.energy.energy(s.removed) for s in spectrum]
        assert list(spectrum) == sorted(spectrum, key=lambda s: (s.energy, s.removed))
        assert len({s.removed for s in spectrum}) == len(spectrum)
        assert all(s.removed == tuple(sorted(s.removed)) for s in spectrum)
        assert spectrum.states == solver.solve(problem, states, seed=3).states
        assert spectrum.certified == exact
        if exact:
            assert_same_list(spectrum, expected[:states], problem)
            assert spectrum.complete == (states > len(expected))
            assert (spectrum.gap, spectrum.lower_bound, spectrum.proved) == (0.0, spectrum[0].energy, len(spectrum))
        else:
            assert spectrum.lower_bound is None
            assert spectrum[0].energy == pytest.approx(expected[0][0], rel=1e-12, abs=1e-300)
