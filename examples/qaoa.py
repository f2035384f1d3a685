"""QAOA on a simulator: how often a measurement gives the ground state of a problem with up to 16 free units.

    pip install qiskit
    python examples/qaoa.py H.npy --remove 4 --depth 3

The quantum alternating operator ansatz of Hadfield et al. (2019): the circuit starts in the Dicke state, the equal
superposition of all configurations that remove M units, and mixes them with XY gates around a ring, which keep that
number. So no penalty is needed. The angles minimise the expected energy; the simulator is exact, without noise or
sampling error.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit
from qiskit.circuit.library import XXPlusYYGate
from qiskit.quantum_info import Statevector
from scipy.optimize import minimize

from excise.errors import InputError
from excise.ising.bridges.qubo import Ising, to_ising
from excise.ising.energies import Energy
from excise.ising.problem import Problem

MOST_UNITS = 16


@dataclass(frozen=True)
class Result:
    """What a measurement of the circuit gives.

    Args:
        removed: The ground state.
        energy: Its energy.
        ground_state_probability: That one measurement gives it.
        uniform_probability: The same for a random configuration that meets the budget.
        low_probability: That one measurement gives any of the ten lowest states.
        expected_energy: Mean energy of a measurement.
        angles: γ of each layer, then β of each layer.

    """

    removed: tuple[int, ...]
    energy: float
    ground_state_probability: float
    uniform_probability: float
    low_probability: float
    expected_energy: float
    angles: tuple[float, ...]


def qaoa(problem: Problem, depth: int = 3, evaluations: int = 200) -> Result:
    """Optimise the angles of a circuit of `depth` layers.

    Raises:
        InputError: more than 16 free units, or a problem that a QUBO cannot express.

    """
    model = to_ising(problem, penalty=1.0)  # constant on all states of the circuit, which meet the budget
    n = len(model.h)
    if not 2 <= n <= MOST_UNITS:
        raise InputError(f"this simulation takes 2 to {MOST_UNITS} free units, got {n}; protect more, or use --remove")
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    spins = 2.0 * bits - 1
    energies = spins @ model.h + np.einsum("si,ij,sj->s", spins, model.J, spins) + model.offset
    allowed = bits.sum(axis=1) == model.count
    spread = float(energies[allowed].std()) or 1.0
    dicke = Statevector(allowed / np.sqrt(allowed.sum()))

    def probabilities(angles: NDArray[np.float64]) -> NDArray[np.float64]:
        state = dicke.evolve(circuit(model, angles[:depth] / spread, angles[depth:]))
        return np.abs(state.data) ** 2

    ramp = (np.arange(depth) + 0.5) / depth  # as in annealing: the energy's share grows, the mixer's shrinks
    start = np.concatenate([0.8 * ramp, -0.8 * (1 - ramp)])
    best = minimize(
        lambda angles: probabilities(angles) @ energies / spread,
        start,
        method="COBYLA",
        options={"maxiter": evaluations},
    )
    chance = probabilities(best.x)
    lowest = np.argsort(np.where(allowed, energies, np.inf))[: min(10, int(allowed.sum()))]
    ground = int(lowest[0])
    removed = model.decode(spins[ground])
    return Result(
        removed,
        problem.energy.energy(removed),
        float(chance[ground]),
        1 / int(allowed.sum()),
        float(chance[lowest].sum()),
        float(chance @ energies),
        tuple(best.x.tolist()),
    )


def circuit(model: Ising, gammas: NDArray[np.float64], betas: NDArray[np.float64]) -> QuantumCircuit:
    """One layer per pair of angles: exp(−iγE) from Z and ZZ rotations, then XY gates on even and odd ring bonds."""
    n = len(model.h)
    layers = QuantumCircuit(n)
    ring = [(k, k + 1) for k in (*range(0, n - 1, 2), *range(1, n - 1, 2))] + ([(n - 1, 0)] if n > 2 else [])
    for gamma, beta in zip(gammas, betas, strict=True):
        for i in range(n):
            layers.rz(-2 * gamma * model.h[i], i)  # a removed unit is |1⟩, where Z is −1 and the spin is 1
            for j in range(i + 1, n):
                layers.rzz(2 * gamma * model.J[i, j], i, j)
        for i, j in ring:
            layers.append(XXPlusYYGate(2 * beta), [i, j])
    return layers


def main() -> None:
    """Read a matrix, run, print one JSON line."""
    parser = argparse.ArgumentParser(description="QAOA on a simulator for one cardinality-constrained problem.")
    parser.add_argument("matrix", help=".npy, .npz or .safetensors, as for excise solve --hessian")
    parser.add_argument("--remove", type=int, required=True)
    parser.add_argument("--units", type=int, nargs="*", help="keep only these units of the matrix")
    parser.add_argument("--depth", type=int, default=3)
    arguments = parser.parse_args()
    energy = Energy.load(arguments.matrix)
    if arguments.units:
        energy = energy.restrict(arguments.units)
    print(json.dumps(asdict(qaoa(Problem(energy, arguments.remove), arguments.depth))))


if __name__ == "__main__":
    main()
