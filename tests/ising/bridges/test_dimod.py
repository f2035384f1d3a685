"""dimod models and samplers."""

import sys

import numpy as np
import pytest

from excise.errors import InputError, MissingExtraError
from excise.ising.bridges.dimod import DimodSampler, simulated_annealing, steepest_descent, tabu, to_bqm, write_bqm
from excise.ising.bridges.qubo import to_qubo
from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most
from excise.ising.solvers import solve

dimod = pytest.importorskip("dimod")


def problem_of(n=10, budget=4, seed=0, **fixed):
    A = np.random.default_rng(seed).standard_normal((3 * n, n))
    return Problem(Energy(0.1 * A[0], A.T @ A / (3 * n)), budget, **fixed)


def test_the_model_has_the_energies_of_the_qubo_over_original_indices(tmp_path):
    problem = problem_of(protected=(1,), forced=(4,))
    qubo = to_qubo(problem)
    write_bqm(problem, tmp_path / "m.bqm")
    with (tmp_path / "m.bqm").open("rb") as file:
        read = dimod.BinaryQuadraticModel.from_file(file)
    for bqm in (to_bqm(problem), read):
        assert tuple(bqm.variables) == qubo.units
        for x in np.random.default_rng(1).integers(0, 2, (50, len(qubo.units))):
            assert bqm.energy(dict(zip(qubo.units, x, strict=True))) == pytest.approx(qubo.energy(x), abs=1e-12)


def test_the_exact_solver_of_dimod_finds_a_feasible_minimum():
    problem = problem_of(protected=(1,), forced=(4,))
    first = dimod.ExactSolver().sample(to_bqm(problem)).first
    removed = tuple(sorted((4, *(unit for unit, value in first.sample.items() if value))))
    assert removed == solve(problem, states=1, solver="exhaustive")[0].removed


@pytest.mark.parametrize("make", [simulated_annealing, tabu, steepest_descent])
def test_samplers_find_the_ground_state_of_a_small_problem(make):
    pytest.importorskip("dwave.samplers")
    problem = problem_of(protected=(2,), forced=(7,))
    expected = solve(problem, states=1, solver="exhaustive")[0]
    spectrum = make().solve(problem, 5, seed=3, time_limit=1.0)
    assert spectrum[0] == expected
    assert all(problem.allows(state.removed) for state in spectrum)
    assert not spectrum.certified
    assert spectrum.lower_bound is None


@pytest.mark.parametrize("make", [simulated_annealing, steepest_descent])
def test_a_seed_gives_the_same_list(make):
    pytest.importorskip("dwave.samplers")
    problem = problem_of(20, 10)
    first, second = (make().solve(problem, 30, seed=5) for _ in range(2))
    assert first.states == second.states


def test_every_sample_is_repaired_by_energy():
    class Everything:
        parameters = frozenset()

        def sample(self, bqm):
            return dimod.SampleSet.from_samples_bqm([dict.fromkeys(reversed(bqm.variables), 1)], bqm)

    problem = Problem(Energy([5.0, 1.0, 4.0, 2.0, 3.0], np.zeros((5, 5))), 2)
    spectrum = DimodSampler(Everything(), reads=1).solve(problem)
    assert [state.removed for state in spectrum] == [(1, 3)]
    assert "1 distinct samples missed the budget" in spectrum.notes[0]


def test_a_problem_without_free_units():
    pytest.importorskip("dwave.samplers")
    problem = problem_of(4, 2, protected=(0, 1), forced=(2, 3))
    assert [state.removed for state in simulated_annealing().solve(problem)] == [(2, 3)]


def test_constraints_are_refused():
    problem = problem_of(6, 2, constraints=(at_most([0, 1], 1, 6),))
    with pytest.raises(InputError, match="holds the budget only"):
        DimodSampler(dimod.RandomSampler()).solve(problem)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dimod", None)
    monkeypatch.setitem(sys.modules, "dwave.samplers", None)
    for call in (lambda: to_bqm(problem_of()), simulated_annealing):
        with pytest.raises(MissingExtraError, match=r"excise\[dimod\]"):
            call()
