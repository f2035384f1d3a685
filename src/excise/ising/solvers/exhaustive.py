"""Enumeration of every state, keeping the K lowest: slow, simple, and the independent check on everything else.

The last q units are taken together: their 2^q partial energies are kept in a table per number of units chosen, so
that one prefix over the other units costs two vectorised passes over the table, whatever number of states it has.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.errors import InputError
from excise.ising.problem import Problem, Reduced
from excise.ising.solvers.base import Deadline, make_spectrum, removed_sets
from excise.ising.solvers.kernels import (
    EMPTY_STATE,
    Pool,
    contents,
    inner_kernel,
    kernel,
    new_pool,
    place_state,
    threshold,
    zobrist,
)
from excise.ising.solvers.places import enumerate_open
from excise.ising.spectrum import Spectrum

PREFIX_COST, ENTRY_COST = 200.0, 0.4  # nanoseconds, only to choose q
PREFIXES_PER_CALL = 200_000


@dataclass(frozen=True)
class Exhaustive:
    """Visit every state.

    Args:
        limit: Refuse problems with more states than this (about 3e8 states are visited in a second).

    """

    limit: int = 10**9
    name: str = "exhaustive"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return the `states` lowest states, certified; cut short by `time_limit`, the lowest seen, not certified.

        Raises:
            InputError: the problem has more states than the limit.

        """
        started, deadline = time.perf_counter(), Deadline.after(time_limit)
        total = problem.number_of_states()
        if total > self.limit:
            raise InputError(
                f"enumeration would visit {total:.3g} states, the limit is {self.limit:.3g}; use the branch-and-bound "
                "solver, which proves the same list, or protect more units"
            )
        pool = new_pool(min(states, total), len(problem.free))
        finished = True
        notes: tuple[str, ...] = ()
        try:
            for count in problem.counts():
                finished = finished and enumerate_states(problem.reduced(count), pool, deadline)
        except KeyboardInterrupt:
            finished = False
        if not finished:
            notes = ("stopped before every state was visited: the list may miss lower ones",)
        _, masks = contents(pool)
        spectrum = make_spectrum(
            problem,
            removed_sets(problem, masks),
            states,
            solver=self.name,
            seconds=time.perf_counter() - started,
            certified=finished,
            evaluated=total if finished else 0,
            seed=seed,
            complete=finished and len(masks) < states,
            notes=notes,
        )
        return spectrum.with_proof() if finished else spectrum


def enumerate_states(reduced: Reduced, pool: Pool, deadline: Deadline) -> bool:
    """Visit every state of a reduced problem, adding the lowest to the pool; False when the deadline came first."""
    n, count = len(reduced.h), reduced.count
    if reduced.places.shape[1]:
        return enumerate_open(reduced, pool, deadline)
    flip = 2 * count > n  # enumerate the kept units when they are fewer
    h, C, bounds, offset = reduced.h, reduced.C, reduced.bounds, 0.0
    if flip:
        ones = reduced.J.sum(axis=1)
        offset = float(h.sum() + ones.sum())
        h, C, bounds, count = -h - 2 * ones, -C, bounds - C.sum(axis=1), n - count
    q = _table_size(n, count)
    tables = _right_tables(h[n - q :], reduced.J[n - q :, n - q :])
    marginals = np.empty((count + 1, n))
    marginals[0] = h + np.diag(reduced.J)
    energies = np.full(count + 1, offset)
    chosen = np.full(count + 1, -1, dtype=np.int64)
    progress = np.array([0, 1], dtype=np.int64)  # depth, whether the node at that depth is still to be visited
    keys = zobrist(n)
    while not deadline.passed():
        if _enumerate(
            reduced.J,
            count,
            q,
            tables,
            marginals,
            energies,
            chosen,
            progress,
            pool,
            keys,
            C,
            bounds,
            flip,
            PREFIXES_PER_CALL,
        ):
            return True
    return False


def _table_size(n: int, count: int) -> int:
    def nanoseconds(q: int) -> float:
        prefixes = sum(math.comb(n - q, count - j) for j in range(min(q, count) + 1))
        return prefixes * (PREFIX_COST + ENTRY_COST * 2**q)

    return min(range(min(n, 12) + 1), key=nanoseconds)


def _right_tables(h: NDArray[np.float64], J: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pair energies of the subsets of the last q units by number chosen: [q + 1, 2^q], infinite where it differs.

    The diagonal of J and h are left out: they are in the marginals that the kernel adds.
    """
    q = len(h)
    subsets = (np.arange(2**q)[:, None] >> np.arange(q)) & 1
    off_diagonal = J - np.diag(np.diag(J))
    energies = np.einsum("bi,ij,bj->b", subsets, off_diagonal, subsets)
    sizes = subsets.sum(axis=1)
    return np.where(sizes[None, :] == np.arange(q + 1)[:, None], energies[None, :], np.inf)


@kernel
def _enumerate(J, count, q, tables, marginals, energies, chosen, progress, pool, keys, C, bounds, flip, limit):  # type: ignore[no-untyped-def]
    """Depth-first over subsets of the first n − q units; resumes where `progress` stands; True when done."""
    n = len(J)
    p = n - q
    values = np.empty(1 << q)
    for _ in range(limit):
        depth = progress[0]
        if progress[1] == 1:
            progress[1] = 0
            missing = count - depth
            if missing <= q:
                _visit_table(
                    energies[depth],
                    marginals[depth],
                    p,
                    q,
                    tables[missing],
                    values,
                    chosen,
                    depth,
                    pool,
                    keys,
                    C,
                    bounds,
                    flip,
                )
            chosen[depth] = chosen[depth - 1] if depth > 0 else -1  # next unit to try is one further
        unit = chosen[depth] + 1
        # Extending with `unit` must leave enough units to reach the count.
        if depth < count and unit < p and depth + (n - unit) >= count:
            chosen[depth] = unit
            energies[depth + 1] = energies[depth] + marginals[depth, unit]
            for k in range(unit + 1, n):
                marginals[depth + 1, k] = marginals[depth, k] + 2 * J[unit, k]
            progress[0] = depth + 1
            progress[1] = 1
        elif depth == 0:
            return True
        else:
            progress[0] = depth - 1
    return False


@inner_kernel
def _visit_table(base, marginal, p, q, table, values, chosen, depth, pool, keys, C, bounds, flip):  # type: ignore[no-untyped-def]
    values[0] = base
    for t in range(q):
        half = 1 << t
        low, high, step = values[:half], values[half : 2 * half], marginal[p + t]
        for b in range(half):
            high[b] = low[b] + step
    limit = threshold(pool)
    hits = 0  # counting, where a minimum would do, is what the compiler turns into vector instructions
    for b in range(len(table)):
        hits += values[b] + table[b] < limit
    if hits > 0:
        for b in range(len(table)):
            energy = values[b] + table[b]
            if energy < limit:
                _keep(energy, p, q, b, chosen, depth, pool, keys, C, bounds, flip)
                limit = threshold(pool)


@inner_kernel
def _keep(energy, p, q, b, chosen, depth, pool, keys, C, bounds, flip):  # type: ignore[no-untyped-def]
    for c in range(len(bounds)):
        total = 0.0
        for d in range(depth):
            total += C[c, chosen[d]]
        for t in range(q):
            if (b >> t) & 1:
                total += C[c, p + t]
        if total < bounds[c]:
            return
    outside = np.uint8(1) if flip else np.uint8(0)
    row = place_state(pool, energy, _hash(p, q, b, chosen, depth, keys))
    pool.masks[row, :] = outside
    for d in range(depth):
        pool.masks[row, chosen[d]] = 1 - outside
    for t in range(q):
        if (b >> t) & 1:
            pool.masks[row, p + t] = 1 - outside


@inner_kernel
def _hash(p, q, b, chosen, depth, keys):  # type: ignore[no-untyped-def]
    key = EMPTY_STATE
    for d in range(depth):
        key ^= keys[chosen[d]]
    for t in range(q):
        if (b >> t) & 1:
            key ^= keys[p + t]
    return key
