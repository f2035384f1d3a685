"""Other people's exact solvers against enumeration."""

import importlib
import math

import numpy as np
import pytest

from excise.errors import InputError, MissingExtraError
from excise.ising.bridges.gurobi import Gurobi
from excise.ising.bridges.highs import Highs, linearise
from excise.ising.bridges.proof import with_pool_bound
from excise.ising.bridges.scip import Scip
from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most, weigh_at_least
from excise.ising.solvers import solve
from excise.ising.spectrum import Spectrum, State


def installed(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


BRIDGES = [
    pytest.param(Gurobi(), marks=installed("gurobipy")),
    pytest.param(Scip(), marks=installed("pyscipopt")),
    pytest.param(Highs()),
]


def random_energy(n, seed, semidefinite=False):
    random = np.random.default_rng(seed)
    A = random.standard_normal((n, n))
    return Energy(random.standard_normal(n), A @ A.T / n if semidefinite else A + A.T)


PROBLEMS = {
    "indefinite": Problem(random_energy(8, 0), 3),
    "semidefinite": Problem(random_energy(8, 1, semidefinite=True), 5),
    "small scale": Problem(Energy(None, 1e-6 * random_energy(8, 2).J), 4),
    "linear": Problem(Energy([3.0, 1.0, 2.0, 7.0], np.zeros((4, 4))), 2),
    "one removed": Problem(random_energy(6, 3), 1),
    "one kept": Problem(random_energy(6, 4), 5),
    "all removed": Problem(random_energy(4, 5), 4),
    "one unit": Problem(Energy([2.0], [[1.0]]), 1),
    "fixed units": Problem(random_energy(9, 6), 4, protected=(0, -1), forced=(3,)),
    "nothing free": Problem(random_energy(4, 7), 2, protected=(0, 1), forced=(2, 3)),
    "at most": Problem(random_energy(8, 8), 3, constraints=(at_most([1, 3, 5, 7], 1, 8),)),
    "weights and no budget": Problem(random_energy(7, 9), None, constraints=(weigh_at_least(range(1, 8), 17),)),
    "no budget, forced": Problem(random_energy(6, 10), None, protected=(5,), forced=(0,)),
}


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_list_is_that_of_enumeration(bridge, name):
    problem = PROBLEMS[name]
    expected = solve(problem, states=5, solver="exhaustive")
    spectrum = bridge.solve(problem, 5, seed=1)
    assert [s.removed for s in spectrum] == [s.removed for s in expected]
    assert [s.energy for s in spectrum] == [s.energy for s in expected]
    assert (spectrum.certified, spectrum.proved, spectrum.gap) == (True, len(expected), 0.0)
    assert spectrum.complete or not expected.complete
    assert (spectrum.solver, spectrum.units, spectrum.budget) == (bridge.name, len(problem.energy), problem.budget)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_a_problem_with_fewer_states_than_asked_is_complete(bridge):
    spectrum = bridge.solve(Problem(random_energy(4, 0), 2), 20)
    assert len(spectrum) == 6
    assert spectrum.complete
    assert spectrum.certified


@pytest.mark.parametrize("bridge", BRIDGES)
def test_ties_are_all_found(bridge):
    spectrum = bridge.solve(Problem(Energy(None, np.eye(5)), 2), 10)
    assert [s.energy for s in spectrum] == [2.0] * 10
    assert len({s.removed for s in spectrum}) == 10


@pytest.mark.parametrize("bridge", BRIDGES)
def test_out_of_time_it_claims_only_what_was_proved(bridge):
    problem = Problem(random_energy(40, 0), 20)
    spectrum = bridge.solve(problem, 50, time_limit=0.3)
    assert not spectrum.certified
    assert spectrum.notes
    assert all(problem.allows(s.removed) for s in spectrum)
    best = solve(problem, states=1, solver="tabu")[0].energy
    assert spectrum.lower_bound is None or spectrum.lower_bound <= best


def test_linearised_energy_is_the_energy():
    problem = Problem(random_energy(7, 1), 3, forced=(2,))
    program = linearise(problem)
    i, j = np.triu_indices(program.n, 1)
    for state in solve(problem, states=15, solver="exhaustive"):
        x = np.isin(problem.free, state.removed).astype(float)
        z = np.concatenate([x, x[i] * x[j]])
        assert (program.A @ z >= program.lower - 1e-12).all()
        assert (program.A @ z <= program.upper + 1e-12).all()
        assert program.cost @ z / program.scale + program.constant == pytest.approx(state.energy, abs=1e-12)


def pool(*energies):
    states = tuple(State((k,), energy) for k, energy in enumerate(energies))
    return Spectrum(states, units=9, budget=1, solver="pool", seconds=0.0)


def test_a_pool_bound_below_the_last_state_proves_only_the_states_before():
    spectrum = with_pool_bound(pool(1.0, 2.0, 3.0), undiscovered=2.5, bound=2.5, exhausted=False, states=3)
    assert (spectrum.certified, spectrum.proved, spectrum.lower_bound, spectrum.gap) == (False, 2, 1.0, 0.0)
    assert "2 of 3" in spectrum.notes[-1]


def test_a_pool_bound_below_every_state_gives_a_gap():
    spectrum = with_pool_bound(pool(2.0, 3.0), undiscovered=1.0, bound=1.5, exhausted=False, states=2)
    assert (spectrum.certified, spectrum.proved, spectrum.lower_bound, spectrum.gap) == (False, 0, 1.5, 0.25)


def test_an_empty_pool_keeps_its_bound():
    spectrum = with_pool_bound(pool(), undiscovered=-math.inf, bound=-4.0, exhausted=False, states=2)
    assert (spectrum.lower_bound, spectrum.gap, spectrum.proved) == (-4.0, None, 0)


def test_a_pool_with_states_missing_is_not_certified():
    assert not with_pool_bound(pool(1.0, 2.0), undiscovered=9.0, bound=1.0, exhausted=False, states=3).certified


@pytest.mark.parametrize(
    ("bridge", "module", "extra"), [(Gurobi(), "gurobipy", "gurobi"), (Scip(), "pyscipopt", "scip")]
)
def test_a_missing_package_is_named_with_its_install_command(bridge, module, extra, monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'excise\[{extra}\]'"):
        bridge.solve(PROBLEMS["linear"], 1)


@installed("gurobipy")
def test_errors_of_gurobi_become_ours():
    with pytest.raises(InputError, match="Gurobi refused"):
        Gurobi().solve(PROBLEMS["linear"], 1, time_limit=-1)
