"""What the solvers do about a pattern: enumerate, draw and check states that keep it.

A state over n free units is a path: from unit to unit, with the number of units kept so far. `places` [2, n, n + 1]
(see `excise.ising.pattern.open_places`) says which steps are open; it is empty, [2, 0, 1], without a pattern.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from excise.ising.pattern import completions
from excise.ising.problem import Reduced
from excise.ising.solvers.base import Deadline
from excise.ising.solvers.kernels import EMPTY_STATE, Pool, inner_kernel, kernel, place_state, threshold, zobrist

STEPS_PER_CALL = 1_000_000


def open_states(reduced: Reduced, states: int, random: NDArray[np.uint64]) -> list[tuple[int, ...]]:
    """Draw states that keep the pattern, all equally likely: free units removed, `reduced.count` of them each."""
    n = len(reduced.h)
    ways = completions(reduced.places, n - reduced.count)
    generator = np.random.default_rng(random)
    drawn = []
    for _ in range(states):
        kept, removed = 0, []
        for k in range(n):
            stays = ways[k + 1][kept + 1] if reduced.places[0, k, kept] else 0
            if generator.random() * ways[k][kept] < stays:
                kept += 1
            else:
                removed.append(k)
        drawn.append(tuple(removed))
    return drawn


@inner_kernel
def misplaced(places, gone, i, j):  # type: ignore[no-untyped-def]
    """How many units are not where they may be, after swapping i back in and j out; i = j = −1 for the present state.

    Args:
        places: See above.
        gone: [n], 1 where a unit is removed.
        i: A unit that is removed.
        j: One that is not.

    """
    kept, wrong = 0, 0
    for k in range(places.shape[1]):
        value = gone[k]
        if k in (i, j):
            value = 1 - value
        if not places[value, k, kept]:
            wrong += 1
        kept += 1 - value
    return wrong


@inner_kernel
def settle(places, order, status, kept, ahead, verdict):  # type: ignore[no-untyped-def]
    """Find which values the units may have in states that keep the pattern; False where there is no such state.

    Args:
        places: See above.
        order: [n], place in `status` of each unit.
        status: [n], −1 for a unit that is free, else its value.
        kept: How many of the n units stay in the end.
        ahead: [n + 1, n + 2], scratch.
        verdict: [n], written: the only value that a free unit may have, in the order of `status`; −1 for both or fixed.

    """
    n = places.shape[1]
    ahead[:, :] = 0  # points that a path from the bottom leads to
    ahead[0, 0] = 1
    for k in range(n):
        value = status[order[k]]
        for j in range(k + 1):
            if ahead[k, j]:
                if value != 1 and places[0, k, j]:
                    ahead[k + 1, j + 1] = 1
                if value != 0 and places[1, k, j]:
                    ahead[k + 1, j] = 1
    if not ahead[n, kept]:
        return False
    for j in range(n + 1):  # from here on, those that a path to the top leads from, too
        ahead[n, j] = 1 if j == kept else 0
    for k in range(n - 1, -1, -1):
        value = status[order[k]]
        may_stay, may_go = False, False
        for j in range(k + 1):
            if ahead[k, j]:
                stays = value != 1 and places[0, k, j] and ahead[k + 1, j + 1] == 1
                goes = value != 0 and places[1, k, j] and ahead[k + 1, j] == 1
                ahead[k, j] = 1 if stays or goes else 0
                may_stay, may_go = may_stay or stays, may_go or goes
        verdict[order[k]] = -1 if value >= 0 or (may_stay and may_go) else 1 if may_go else 0
    return True


def enumerate_open(reduced: Reduced, pool: Pool, deadline: Deadline) -> bool:
    """Visit every state that keeps the pattern, adding the lowest to the pool; False when the deadline came first."""
    n, count = len(reduced.h), reduced.count
    ways = completions(reduced.places, n - count)
    reachable = np.array([[number > 0 for number in row] for row in ways])
    marginals = np.empty((count + 1, n))
    marginals[0] = reduced.h + np.diag(reduced.J)
    energies = np.zeros(count + 1)
    values = np.full(n + 1, -1, dtype=np.int64)
    progress = np.zeros(2, dtype=np.int64)  # unit that is to be decided, units removed below it
    while not deadline.passed():
        if _enumerate_open(
            reduced.J,
            reduced.places,
            reachable,
            marginals,
            energies,
            values,
            progress,
            pool,
            zobrist(n),
            reduced.C,
            reduced.bounds,
            STEPS_PER_CALL,
        ):
            return True
    return False


@kernel
def _enumerate_open(J, places, reachable, marginals, energies, values, progress, pool, keys, C, bounds, limit):  # type: ignore[no-untyped-def]
    """Depth-first over the units; resumes where `progress` stands; True when done."""
    n = len(J)
    k, removed = progress[0], progress[1]
    for _ in range(limit):
        if k == n:
            if energies[removed] < threshold(pool):
                _keep(energies[removed], values, pool, keys, C, bounds)
        elif values[k] < 1:
            values[k] += 1
            value, kept = values[k], k - removed
            if places[value, k, kept] and reachable[k + 1, kept + 1 - value]:
                if value == 1:
                    energies[removed + 1] = energies[removed] + marginals[removed, k]
                    for i in range(k + 1, n):
                        marginals[removed + 1, i] = marginals[removed, i] + 2 * J[k, i]
                    removed += 1
                k += 1
                values[k] = -1
            continue
        if k == 0:
            return True
        k -= 1
        removed -= values[k]
    progress[0], progress[1] = k, removed
    return False


@inner_kernel
def _keep(energy, values, pool, keys, C, bounds):  # type: ignore[no-untyped-def]
    n = len(keys)
    for c in range(len(bounds)):
        total = 0.0
        for i in range(n):
            total += values[i] * C[c, i]
        if total < bounds[c]:
            return
    key = EMPTY_STATE
    for i in range(n):
        if values[i] == 1:
            key ^= keys[i]
    row = place_state(pool, energy, key)
    for i in range(n):
        pool.masks[row, i] = values[i]
