"""What searches by swaps share, tabu search and annealing: states, moves and constraints as penalties."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from excise.ising.problem import Reduced
from excise.ising.solvers.kernels import EMPTY_STATE, inner_kernel, is_known, next_random, place_state, threshold
from excise.ising.solvers.places import misplaced


def penalised(reduced: Reduced) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Constraints scaled to a largest weight of 1, and a penalty per unit of violation above any change of energy."""
    scale = np.maximum(np.abs(reduced.C).max(axis=1, initial=0.0), 1e-300)
    penalty = 2 * float(np.abs(reduced.h).sum() + np.abs(reduced.J).sum()) + 1.0
    return penalty, np.ascontiguousarray(reduced.C / scale[:, None]), reduced.bounds / scale


@inner_kernel
def random_subset(units, count, random):  # type: ignore[no-untyped-def]
    """Shuffle `units` in place so that its first `count` entries are a uniform random subset."""
    n = len(units)
    for k in range(min(count, n - 1)):
        other = k + next_random(random) % (n - k)
        units[k], units[other] = units[other], units[k]


@inner_kernel
def marginals_of(h, J, inside):  # type: ignore[no-untyped-def]
    """c_i = h_i + J_ii + 2 Σ_{j inside, j≠i} J_ij, what adding i costs (or what removing it saves), and the energy."""
    n = len(h)
    c = np.empty(n)
    energy = 0.0
    for i in range(n):
        c[i] = h[i] + J[i, i]
        for j in inside:
            if j != i:
                c[i] += 2 * J[i, j]
    for i in inside:
        energy += (c[i] + h[i] + J[i, i]) / 2
    return c, energy


@inner_kernel
def violation(C, bounds, totals, i, j):  # type: ignore[no-untyped-def]
    """Sum of violations after swapping i out and j in; pass i = j for the present state."""
    amount = 0.0
    for c in range(len(bounds)):
        amount += max(0.0, bounds[c] - totals[c] - C[c, j] + C[c, i])
    return amount


@inner_kernel
def record(pool, energy, key, inside, out_unit, in_unit):  # type: ignore[no-untyped-def]
    """Add the state `inside` with out_unit replaced by in_unit (−1, −1 for itself), unless the pool has it."""
    if is_known(pool, key):
        return
    row = place_state(pool, energy, key)
    pool.masks[row, :] = 0
    for i in inside:
        pool.masks[row, i] = 1
    if out_unit >= 0:
        pool.masks[row, out_unit] = 0
        pool.masks[row, in_unit] = 1


@inner_kernel
def first_state(h, J, inside, pool, keys, C, bounds, places):  # type: ignore[no-untyped-def]
    """Marginals, energy, hash, constraint totals, mask and violation of a search's first state; it is recorded."""
    c, energy = marginals_of(h, J, inside)
    key = EMPTY_STATE
    for i in inside:
        key ^= keys[i]
    totals = np.zeros(len(bounds))
    for k in range(len(bounds)):
        for i in inside:
            totals[k] += C[k, i]
    gone = np.zeros(len(h), dtype=np.int64)
    for i in inside:
        gone[i] = 1
    violated = violation(C, bounds, totals, 0, 0) + misplaced(places, gone, -1, -1)
    if violated == 0.0 and energy < threshold(pool):
        record(pool, energy, key, inside, -1, -1)
    return c, energy, key, totals, gone, violated


@inner_kernel
def swap(J, C, i, j, c, totals):  # type: ignore[no-untyped-def]
    """Bring marginals and constraint totals up to date, in place, for i swapped out and j in."""
    for k in range(len(c)):
        if k != i and k != j:
            c[k] += 2 * (J[k, j] - J[k, i])
    c[i] += 2 * J[i, j]
    c[j] -= 2 * J[i, j]
    for k in range(len(totals)):
        totals[k] += C[k, j] - C[k, i]
