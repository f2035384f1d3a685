import itertools
import subprocess
import sys

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import SOLVERS, make_solver, solve


def problem_of(n=12, budget=5, seed=0):
    J = np.random.default_rng(seed).standard_normal((n, n))
    return Problem(Energy(None, J + J.T), budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": 0}, "states"),
        ({"min_distance": 0}, "min_distance"),
        ({"time_limit": 0}, "time limit"),
        ({"solver": "oracle"}, "unknown solver 'oracle'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        solve(problem_of(), **arguments)


@pytest.mark.parametrize("min_distance", [2, 4, 6])
def test_distance_is_greedy_over_the_whole_sorted_spectrum(min_distance):
    problem = problem_of()
    every = sorted((problem.energy.energy(c), c) for c in itertools.combinations(range(12), 5))
    kept = []
    for _, units in every:
        if all(len(set(units) ^ set(other)) >= min_distance for other in kept):
            kept.append(units)
    spectrum = solve(problem, states=7, min_distance=min_distance)
    assert [s.removed for s in spectrum] == kept[:7]
    assert spectrum.certified


def test_distance_that_leaves_too_few_states_says_so():
    spectrum = solve(problem_of(), states=7, min_distance=10)
    assert len(spectrum) < 7
    assert "no others exist" in spectrum.notes[-1]


def test_names_are_the_solvers_own():
    for name in SOLVERS:
        if "bridges" not in SOLVERS[name]:
            assert make_solver(name).name == name


def test_solving_imports_neither_torch_nor_transformers():
    code = (
        "import sys, numpy as np; from excise.ising.energies import Energy; from excise.ising.problem import Problem; "
        "from excise.ising.solvers import solve; print(len(solve(Problem(Energy(None, np.eye(5)), 2)))); "
        "print([m for m in ('torch', 'transformers', 'scipy.optimize') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == ["10", "[]"]
