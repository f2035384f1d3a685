"""A problem as a mixed-integer linear program, and its K lowest states by excluding each one found.

Every product x_i x_j becomes a variable y_ij. With a budget m, Σ_{j≠i} y_ij = (m − 1) x_i holds in every state; these
rows (the first level of Sherali and Adams' reformulation-linearisation, 1990) make the relaxation tight, and with
y_ij ≤ x_i and y_ij ≤ x_j they leave y no freedom.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from excise.problem import Problem
from excise.solvers.base import make_spectrum, removed_sets
from excise.spectrum import Spectrum

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class Linearised:
    """Minimise costᵀz with lower ≤ Az ≤ upper, 0 ≤ z ≤ 1; the first n entries of z are x, binary."""

    cost: NDArray[np.float64]  # [n + pairs], multiplied by `scale`
    A: csr_array
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    n: int
    count: int | None
    scale: float
    constant: float

    def exclusion(self, x: NDArray[np.int8]) -> tuple[NDArray[np.float64], float]:
        """Row a and bound b of the constraint aᵀx ≤ b that excludes the state x and no other."""
        if self.count is not None:
            return x.astype(np.float64), float(x.sum() - 1)
        return 2.0 * x - 1.0, float(x.sum() - 1)


@dataclass(frozen=True)
class Answer:
    """One solve: the best state found, and whether it is proved to be the lowest left (`x` None: none is left)."""

    x: NDArray[np.int8] | None
    proved: bool
    bound: float
    nodes: int


class Backend(Protocol):
    """A mixed-integer solver that holds a Linearised model."""

    def solve(self, seconds: float) -> Answer:
        """Solve within a time limit."""
        ...

    def exclude(self, row: NDArray[np.float64], bound: float) -> None:
        """Add the constraint row·x ≤ bound."""
        ...


def linearise(problem: Problem) -> Linearised:
    """Build the linear program over the free units of a problem."""
    from scipy.sparse import csr_array, vstack

    reduced = problem.reduced(len(problem.forced) if problem.budget is None else None)
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
    scale = 1000.0 / (np.abs(cost).max(initial=0.0) or 1.0)
    return Linearised(
        cost=scale * cost,
        A=csr_array(vstack([rows for rows, _, _ in parts])),
        lower=np.concatenate([np.broadcast_to(low, rows.shape[0]) for rows, low, _ in parts]),
        upper=np.concatenate([np.broadcast_to(high, rows.shape[0]) for rows, _, high in parts]),
        n=n,
        count=None if problem.budget is None else reduced.count,
        scale=scale,
        constant=reduced.constant,
    )


def lowest_by_exclusion(
    problem: Problem,
    states: int,
    start: Callable[[Linearised], Backend],
    *,
    solver: str,
    seed: int,
    time_limit: float | None,
) -> Spectrum:
    """The K lowest states: solve, exclude the state found, solve again; each solve proves one more state.

    Args:
        problem: What to solve.
        states: Number of states K.
        start: Gives the backend its model.
        solver: Name for the spectrum.
        seed: For the spectrum; the backend has its own.
        time_limit: Seconds for all solves together.

    """
    started = time.perf_counter()
    deadline = math.inf if time_limit is None else started + time_limit
    program = linearise(problem)
    backend = start(program)
    found: list[NDArray[np.int8]] = []
    proved, nodes, exhausted, bound, notes = 0, 0, False, -math.inf, ("proved within the solver's tolerances",)
    while proved < states:
        answer = backend.solve(max(0.01, deadline - time.perf_counter()))
        nodes += answer.nodes
        bound = max(bound, answer.bound / program.scale + program.constant) if not proved else bound
        if answer.x is not None:
            found.append(answer.x)
        if not answer.proved:
            notes = (f"stopped after {proved} of {states} states were proved",)
            break
        if answer.x is None:
            exhausted = True
            break
        proved += 1
        backend.exclude(*program.exclusion(answer.x))
    masks = np.array(found, dtype=np.uint8).reshape(len(found), program.n)
    spectrum = make_spectrum(
        problem,
        [removed for removed in removed_sets(problem, masks) if problem.allows(removed)],
        states,
        solver=solver,
        seconds=time.perf_counter() - started,
        evaluated=nodes,
        seed=seed,
        notes=notes,
    )
    if exhausted or proved == len(spectrum) == states:
        return replace(spectrum.with_proof(), complete=exhausted)
    if not len(spectrum):
        return replace(spectrum, lower_bound=bound if math.isfinite(bound) else None)
    lowest = spectrum[0].energy
    lower = lowest if proved else min(bound, lowest)
    if not math.isfinite(lower):
        return spectrum
    gap = (lowest - lower) / abs(lowest) if lowest else None
    return replace(spectrum, lower_bound=lower, gap=gap, proved=proved)


def _rows(width: int, terms: list[tuple[NDArray[np.float64], NDArray[np.intp]]]) -> csr_array:
    """One row per pair: the sum of the given (coefficient, column) terms."""
    from scipy.sparse import csr_array

    values = np.concatenate([value for value, _ in terms])
    columns = np.concatenate([column for _, column in terms])
    return csr_array(
        (values, (np.tile(np.arange(len(terms[0][0])), len(terms)), columns)), shape=(len(terms[0][0]), width)
    )
