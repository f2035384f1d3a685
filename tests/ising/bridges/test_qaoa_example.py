"""The QAOA example: the circuit keeps the number of removed units and favours the ground state."""

import itertools

import numpy as np
import pytest

pytest.importorskip("qiskit")

from examples.qaoa import circuit, qaoa
from qiskit.quantum_info import Statevector
from scipy.linalg import expm

from excise.errors import InputError
from excise.ising.bridges.qubo import to_ising
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import solve


def problem_of(n, budget, seed=0, **fixed):
    A = np.random.default_rng(seed).standard_normal((2 * n, n))
    return Problem(Energy(None, A.T @ A / n), budget, **fixed)


def test_one_layer_is_the_phase_of_the_energy_then_xy_mixing():
    model = to_ising(problem_of(3, 1), penalty=1.0)
    gamma, beta = 0.3, 0.7
    X, Y = np.array([[0, 1], [1, 0]]), np.array([[0, -1j], [1j, 0]])

    def on(gate, *places):  # qubit 0 is the least significant bit
        factors = [gate if k in places else np.eye(2) for k in reversed(range(3))]
        return np.kron(np.kron(factors[0], factors[1]), factors[2])

    spins = np.array([[2 * (s >> k & 1) - 1 for k in range(3)] for s in range(8)])
    layer = np.diag(np.exp(-1j * gamma * np.array([model.energy(s) for s in spins])))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        layer = expm(-0.5j * beta * (on(X, i, j) + on(Y, i, j))) @ layer
    start = np.random.default_rng(0).standard_normal(8)
    start /= np.linalg.norm(start)
    state = Statevector(start).evolve(circuit(model, np.array([gamma]), np.array([beta]))).data
    assert abs(np.vdot(layer @ start, state)) == pytest.approx(1.0)
    kept = np.array([bin(s).count("1") == 1 for s in range(8)])
    only = Statevector(kept / np.sqrt(3)).evolve(circuit(model, np.array([gamma]), np.array([beta]))).data
    assert np.abs(only[~kept]).max() == pytest.approx(0.0, abs=1e-12)


def test_the_ground_state_is_measured_more_often_than_at_random():
    problem = problem_of(6, 3, protected=(1,))
    result = qaoa(problem, depth=2, evaluations=60)
    ground = solve(problem, states=1, solver="exhaustive")[0]
    states = [c for c in itertools.combinations(range(6), 3) if 1 not in c]
    mean = np.mean([problem.energy.energy(c) for c in states])
    assert (result.removed, result.energy) == (ground.removed, ground.energy)
    assert ground.energy <= result.expected_energy < mean
    assert result.ground_state_probability > 1.5 * result.uniform_probability
    assert result.ground_state_probability <= result.low_probability == pytest.approx(1.0)  # there are ten states


def test_too_many_units_are_refused():
    with pytest.raises(InputError, match="2 to 16 free units"):
        qaoa(problem_of(17, 3))
