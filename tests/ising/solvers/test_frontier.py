"""A search that goes on from where one stood ends as one that was not interrupted."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.problem import Problem, weigh_at_least
from excise.ising.solvers.branch_and_bound import BranchAndBound
from excise.ising.solvers.frontier import Frontier

from .problems import assert_same_list, matrix


def problem(n=44, budget=20, kind="indefinite", **more):
    """Beyond the root, and proved within a second."""
    return Problem(Energy(None, matrix(kind, n, np.random.default_rng(3))), budget, **more)


def in_steps(problem, states, folder, *, seconds=0.001, most=400):
    """A proof in many calls, each from the file that the last one left; all their spectra."""
    solver, frontier, spectra = BranchAndBound(restarts=5), None, []
    for _ in range(most):
        spectrum, left = solver.proceed(problem, states, frontier, time_limit=seconds)
        spectra.append(spectrum)
        if left is None:
            return spectra
        left.save(folder / "open.safetensors")
        frontier = Frontier.load(folder / "open.safetensors")
        # The first steps end before the tree is begun, however fast the machine; longer ones get beyond tabu search.
        seconds *= 1.2
    raise AssertionError("no end")


@pytest.mark.parametrize(
    "made",
    [
        problem(),
        problem(forced=(3,), protected=(0, -1)),
        problem(34, None, constraints=(weigh_at_least(np.arange(34), 300),)),
    ],
    ids=["plain", "fixed", "any number"],
)
def test_many_steps_end_as_one(made, tmp_path):
    whole = BranchAndBound(restarts=5).solve(made, 20)
    spectra = in_steps(made, 20, tmp_path)
    assert len(spectra) > 1
    assert whole.certified
    assert spectra[-1].certified
    assert_same_list(spectra[-1], [(state.energy, state.removed) for state in whole], made)
    bounds = [spectrum.lower_bound for spectrum in spectra if spectrum.lower_bound is not None]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(bounds))


@pytest.mark.parametrize("other", [problem(budget=19), problem(protected=(1,)), problem(kind="psd")])
def test_another_problem_is_refused(other, tmp_path):
    _, left = BranchAndBound(restarts=1).proceed(problem(), 5, None, time_limit=0.001)
    with pytest.raises(InputError, match="of another problem"):
        BranchAndBound().proceed(other, 5, left)
    with pytest.raises(InputError, match="number of states"):
        BranchAndBound().proceed(problem(), 6, left)


def test_the_command_line_goes_on(excise, tmp_path):
    np.save(tmp_path / "H.npy", matrix("indefinite", 60, np.random.default_rng(3)))
    asked = ("solve", "--hessian", tmp_path / "H.npy", "--remove", 28, "--states", 5)
    first, left, second = tmp_path / "a.json", tmp_path / "a.open.safetensors", tmp_path / "b.json"
    status, out, _ = excise(*asked, "--time-limit", 0.001, "--out", first)
    assert status == 0
    assert f"--continue {left}" in "".join(out.split("\n"))
    status, _, error = excise(*asked[:-1], 6, "--continue", left)
    assert status == 2
    assert "of another problem" in error
    assert excise(*asked, "--continue", left, "--out", second)[0] == 0
    assert json.loads(second.read_text())["certified"]
    assert not (tmp_path / "b.open.safetensors").exists()
    status, _, error = excise(*asked, "--continue", left, "--min-distance", 2)
    assert status == 2
    assert "--min-distance 1" in error
    status, _, error = excise(*asked, "--continue", first)
    assert status == 2
    assert "damaged, or no safetensors file" in error or "open" in error
