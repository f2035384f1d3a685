"""D-Wave's dimod: a problem as a binary quadratic model, and any dimod sampler as a solver."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.artefacts import atomic_path
from excise.errors import InputError
from excise.ising.bridges.extras import require
from excise.ising.bridges.qubo import penalisable, soft_penalty, to_qubo
from excise.ising.bridges.repair import to_count
from excise.ising.problem import Problem
from excise.ising.solvers.base import make_spectrum
from excise.ising.spectrum import Spectrum
from excise.plain import Facts

# Few samplers know a time limit; between calls there is a chance to look at the clock.
READS_PER_CALL = 100


def to_bqm(problem: Problem, penalty: float | None = None) -> Any:
    """A `dimod.BinaryQuadraticModel` whose variables are the original indices of the free units.

    Args:
        problem: With a budget and without further constraints.
        penalty: As for `to_qubo`.

    Raises:
        InputError: as for `to_qubo`.
        MissingExtraError: dimod is not installed.

    """
    dimod = require("dimod", "dimod")
    qubo = to_qubo(problem, penalty)
    i, j = np.triu_indices(len(qubo.Q), 1)
    return dimod.BinaryQuadraticModel.from_numpy_vectors(
        np.diag(qubo.Q), (i, j, 2 * qubo.Q[i, j]), qubo.offset, dimod.BINARY, variable_order=list(qubo.units)
    )


def write_bqm(problem: Problem, path: Any, penalty: float | None = None) -> None:
    """Write dimod's own file format, read by `dimod.BinaryQuadraticModel.from_file`; arguments as for `to_bqm`."""
    with to_bqm(problem, penalty).to_file() as content, atomic_path(path) as temporary:
        temporary.write_bytes(content.read())


@dataclass(frozen=True, eq=False)
class DimodSampler:
    """Any dimod sampler as a solver, D-Wave's annealers included; samples that miss the budget are repaired by energy.

    It proves nothing, and lists only states it sampled.

    Args:
        sampler: An object with dimod's interface (`sample`, `parameters`).
        reads: Number of samples, where the sampler takes `num_reads`.
        penalty: P of the QUBO; None for `soft_penalty`.
        parameters: Further arguments of `sampler.sample`.
        name: Name in the spectrum.

    """

    sampler: Any
    reads: int = 1000
    penalty: float | None = None
    parameters: Facts = field(default_factory=dict)
    name: str = "dimod"

    def __post_init__(self) -> None:
        if self.reads < 1:
            raise InputError(f"reads must be 1 or more, got {self.reads}")

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states sampled; the time limit is checked between calls of 100 reads.

        Raises:
            InputError: the problem has further constraints or no budget.
            MissingExtraError: dimod is not installed.

        """
        started = time.perf_counter()
        deadline = math.inf if time_limit is None else started + time_limit
        reduced = penalisable(problem)
        bqm = to_bqm(problem, soft_penalty(problem) if self.penalty is None else self.penalty)
        taken, repaired = 0, 0
        found: set[tuple[int, ...]] = set()
        random = np.random.default_rng(seed)
        while taken < self.reads and time.perf_counter() < deadline:
            samples = self._sample(bqm, reduced.units, min(READS_PER_CALL, self.reads - taken), random)
            taken += len(samples)
            for x in np.unique(samples, axis=0):
                repaired += int(x.sum() != reduced.count)
                found.add(reduced.removed(np.flatnonzero(to_count(reduced, x))))
        return make_spectrum(
            problem,
            found,
            states,
            solver=self.name,
            seconds=time.perf_counter() - started,
            evaluated=taken,
            seed=seed,
            notes=(f"{repaired} distinct samples missed the budget and were repaired",) if repaired else (),
        )

    def _sample(self, bqm: Any, units: NDArray[np.int64], reads: int, random: np.random.Generator) -> NDArray[np.int8]:
        if not len(units):
            return np.zeros((reads, 0), dtype=np.int8)
        arguments: Facts = {"num_reads": reads, "seed": int(random.integers(2**31))}
        # Samplers differ in what they take, and complain of what they do not know.
        taken = {name: value for name, value in arguments.items() if name in self.sampler.parameters}
        answer = self.sampler.sample(bqm, **{**taken, **self.parameters})
        places = [answer.variables.index(unit) for unit in units.tolist()]
        samples: NDArray[np.int8] = np.repeat(answer.record.sample, answer.record.num_occurrences, axis=0)
        return samples[:, places].astype(np.int8)


def simulated_annealing() -> DimodSampler:
    """dwave-samplers' simulated annealing.

    Raises:
        MissingExtraError: dwave-samplers is not installed.

    """
    return DimodSampler(require("dwave.samplers", "dimod").SimulatedAnnealingSampler(), name="dimod-sa")


def tabu() -> DimodSampler:
    """dwave-samplers' tabu search, 100 reads of 20 ms each.

    Raises:
        MissingExtraError: dwave-samplers is not installed.

    """
    return DimodSampler(require("dwave.samplers", "dimod").TabuSampler(), reads=100, name="dimod-tabu")


def steepest_descent() -> DimodSampler:
    """dwave-samplers' steepest descent from random states.

    Raises:
        MissingExtraError: dwave-samplers is not installed.

    """
    return DimodSampler(require("dwave.samplers", "dimod").SteepestDescentSampler(), name="dimod-descent")
