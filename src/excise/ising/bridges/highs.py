"""HiGHS, the copy that SciPy carries, on a linearised problem: needs no extra.

Every product x_i x_j becomes a variable y_ij. With a budget m, Σ_{j≠i} y_ij = (m − 1) x_i holds in every state; these
rows (the first level of Sherali and Adams' reformulation-linearisation, 1990) make the relaxation tight, and with
y_ij ≤ x_i and y_ij ≤ x_j they leave y no freedom.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from excise.ising.bridges.exclusion import LARGEST, Answer, exclusion, free_part, lowest_by_exclusion
from excise.ising.problem import Problem
from excise.ising.spectrum import Spectrum

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Highs:
    """The K lowest states by K solves, each excluding the states before; proved within HiGHS's tolerances.

    Deterministic: the seed is only recorded.
    """

    name: str = "highs"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states."""
        started = time.perf_counter()
        return lowest_by_exclusion(
            problem, states, _HighsModel(problem), solver=self.name, seed=seed, started=started, time_limit=time_limit
        )


@dataclass(frozen=True, eq=False)
class Linearised:
    """Minimise costᵀz / scale + constant with lower ≤ Az ≤ upper, 0 ≤ z ≤ 1; the first n entries of z are x, binary."""

    cost: NDArray[np.float64]  # [n + pairs]
    A: csr_array
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    n: int
    scale: float
    constant: float


def linearise(problem: Problem) -> Linearised:
    """Build the linear program over the free units of a problem."""
    from scipy.sparse import csr_array, vstack

    reduced = free_part(problem)
    n = len(reduced.h)
    i, j = np.triu_indices(n, 1)
    pairs = len(i)
    pair, width = n + np.arange(pairs), n + pairs
    size = np.abs(reduced.C).max(axis=1, initial=0.0)
    size[size == 0] = 1.0
    weights = np.hstack([reduced.C / size[:, None], np.zeros((len(size), pairs))])
    one = np.ones(pairs)
    below_i = _rows(width, [(one, pair), (-one, i)])
    below_j = _rows(width, [(one, pair), (-one, j)])
    total = np.concatenate([np.ones(n), np.zeros(pairs)])[None, :]
    parts = [(csr_array(weights), reduced.bounds / size, np.inf), (below_i, -np.inf, 0.0), (below_j, -np.inf, 0.0)]
    if problem.budget is None:
        parts.append((csr_array(total), 0.0 if reduced.forced else 1.0, np.inf))
        parts.append((_rows(width, [(one, pair), (-one, i), (-one, j)]), -1.0, np.inf))
    else:
        parts.append((csr_array(total), float(reduced.count), float(reduced.count)))
        incidence = csr_array((np.r_[one, one], (np.r_[i, j], np.r_[pair, pair])), shape=(n, width))
        own = csr_array((np.full(n, 1.0 - reduced.count), (np.arange(n), np.arange(n))), shape=(n, width))
        parts.append((incidence + own, 0.0, 0.0))
    cost = np.concatenate([reduced.h + np.diag(reduced.J), 2 * reduced.J[i, j]])
    scale = LARGEST / (np.abs(cost).max(initial=0.0) or 1.0)
    return Linearised(
        cost=scale * cost,
        A=csr_array(vstack([rows for rows, _, _ in parts])),
        lower=np.concatenate([np.broadcast_to(low, rows.shape[0]) for rows, low, _ in parts]),
        upper=np.concatenate([np.broadcast_to(high, rows.shape[0]) for rows, _, high in parts]),
        n=n,
        scale=scale,
        constant=reduced.constant,
    )


class _HighsModel:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.program = problem, linearise(problem)
        self.rows: list[NDArray[np.float64]] = []
        self.bounds: list[float] = []

    def solve(self, seconds: float) -> Answer:
        from scipy.optimize import Bounds, LinearConstraint, milp

        program, width = self.program, len(self.program.cost)
        if width == 0:
            return Answer(None if self.rows else np.zeros(0, dtype=np.int8), True, program.constant, 0)
        constraints = [LinearConstraint(program.A, program.lower, program.upper)]
        if self.rows:
            constraints.append(LinearConstraint(np.array(self.rows), -np.inf, np.array(self.bounds)))
        result = milp(
            program.cost,
            constraints=constraints,
            bounds=Bounds(np.zeros(width), np.ones(width)),
            # Products follow from x, so only x is branched on.
            integrality=np.arange(width) < program.n,
            # The default gap of 1e-4 would call optimal what is not.
            options={"mip_rel_gap": 0.0, **({"time_limit": seconds} if math.isfinite(seconds) else {})},
        )
        x = None if result.x is None else (result.x[: program.n] > 0.5).astype(np.int8)
        bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        return Answer(
            x, result.status in (0, 2), bound / program.scale + program.constant, int(result.mip_node_count or 0)
        )

    def exclude(self, x: NDArray[np.int8]) -> None:
        row, bound = exclusion(self.problem, x)
        self.rows.append(np.concatenate([row, np.zeros(len(self.program.cost) - len(row))]))
        self.bounds.append(bound)


def _rows(width: int, terms: list[tuple[NDArray[np.float64], NDArray[np.intp]]]) -> csr_array:
    """One row per pair: the sum of the given (coefficient, column) terms."""
    from scipy.sparse import csr_array

    values = np.concatenate([value for value, _ in terms])
    columns = np.concatenate([column for _, column in terms])
    return csr_array(
        (values, (np.tile(np.arange(len(terms[0][0])), len(terms)), columns)), shape=(len(terms[0][0]), width)
    )
