"""Tabu search with swap moves: one unit back in, one out, so the number of removed units (the magnetisation) is kept.

Every swap that is evaluated, not only those made, is offered to the pool; that is why the whole low spectrum is found
and not only the ground state. Of many units, what the starts ended with is relinked (`relinking`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.ising.problem import Problem, Reduced
from excise.ising.solvers.base import Deadline, make_spectrum, removed_sets
from excise.ising.solvers.kernels import Pool, contents, kernel, new_pool, next_random, random_state, threshold, zobrist
from excise.ising.solvers.places import misplaced, open_states
from excise.ising.solvers.relinking import Elite
from excise.ising.solvers.swaps import first_state, penalised, random_subset, record, swap, violation
from excise.ising.spectrum import Spectrum

# Below, random starts find everything, and a path costs more than the search from it.
FEWEST_RELINKED = 64
RELINKED = 4  # starts between good states, at most, for each random one


@dataclass(frozen=True)
class Tabu:
    """Multi-start tabu search; finds the lowest states almost always and proves nothing.

    Args:
        restarts: Number of random starts, for each number of removed units; beyond 64 units at most four times as many
            from between good states follow.
        patience: A start ends after `patience`·N + 20 moves without improvement.

    """

    restarts: int = 100
    patience: int = 2
    name: str = "tabu"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return the `states` lowest states seen. The same seed gives the same result unless time runs out."""
        started, deadline = time.perf_counter(), Deadline.after(time_limit)
        total = problem.number_of_states()
        pool = new_pool(min(states, total), len(problem.free))
        random = random_state(seed)
        moves = 0
        notes: tuple[str, ...] = ()
        try:
            for count in problem.counts():
                moves += search(problem.reduced(count), pool, random, self.restarts, self.patience, deadline)
        except KeyboardInterrupt:
            notes = ("interrupted",)
        if deadline.passed():
            notes = ("time limit reached",)
        _, masks = contents(pool)
        return make_spectrum(
            problem,
            removed_sets(problem, masks),
            states,
            solver=self.name,
            seconds=time.perf_counter() - started,
            evaluated=moves,
            seed=seed,
            complete=len(masks) == total < states,
            notes=notes,
        )


def search(
    reduced: Reduced,
    pool: Pool,
    random: NDArray[np.uint64],
    restarts: int,
    patience: int,
    deadline: Deadline,
    starts: Iterable[Sequence[int]] = (),
) -> int:
    """Run tabu search on a reduced problem, adding to the pool; return the number of moves made.

    Constraints and the pattern enter as a penalty on the moves; only states that satisfy them reach the pool.

    Args:
        reduced: The problem.
        pool: Where the states go.
        random: State of the generator.
        restarts: Number of random starts, which keep the pattern if there is one.
        patience: See Tabu.
        deadline: When to stop.
        starts: Further starts, before the random ones: free units to remove, `reduced.count` of them each.

    """
    penalty, C, bounds = penalised(reduced)
    n = len(reduced.h)
    keys = zobrist(n)
    moves = 0
    elite = Elite(reduced)
    patterned = reduced.places.shape[1] > 0
    drawn = open_states(reduced, restarts, random) if patterned else [()] * restarts
    # A path knows nothing of a pattern, and what lies on it would have to be found again.
    between = itertools.islice(elite.starts(), RELINKED * restarts if n > FEWEST_RELINKED and not patterned else 0)
    for start in itertools.chain(starts, drawn, between):
        units = np.array([*start, *sorted(set(range(n)) - set(start))], dtype=np.int64)
        moves += _one_start(
            reduced.h,
            reduced.J,
            reduced.count,
            units,
            len(start) == 0,
            patience,
            random,
            pool,
            keys,
            C,
            bounds,
            penalty,
            reduced.places,
        )
        elite.add(units[: reduced.count])
        if deadline.passed():
            break
    return moves


@kernel
def _one_start(h, J, count, units, shuffle, patience, random, pool, keys, C, bounds, penalty, places):  # type: ignore[no-untyped-def]
    """Search from the first `count` units, or random ones; in their place it leaves the best it found."""
    n = len(h)
    ordered = places.shape[1] > 0
    if shuffle:
        random_subset(units, count, random)
    inside, outside = units[:count], units[count:]
    c, energy, key, totals, gone, violated = first_state(h, J, inside, pool, keys, C, bounds, places)
    if count == 0 or count == n:
        return 0
    free_from = np.zeros(n, dtype=np.int64)
    best = energy + penalty * violated
    lowest = inside.copy()
    # The running energy drifts by rounding; where the lowest is near 0, that must not pass for progress.
    least_gain = 1e-13 * (np.abs(h).sum() + np.abs(J).sum())
    move, last_improvement = 0, 0
    while move - last_improvement < patience * n + 20:
        move += 1
        best_score, best_a, best_b = np.inf, -1, -1
        limit = threshold(pool)
        for a in range(count):
            i = inside[a]
            base = energy - c[i]
            for b in range(n - count):
                j = outside[b]
                value = base + c[j] - 2 * J[i, j]
                score = value
                if (ordered or len(bounds) > 0) and (value < limit or value < best_score):
                    score += penalty * (violation(C, bounds, totals, i, j) + misplaced(places, gone, i, j))
                if value < limit and score == value:
                    record(pool, value, key ^ keys[i] ^ keys[j], inside, i, j)
                    limit = threshold(pool)
                if score < best_score and (score < best or (free_from[i] <= move and free_from[j] <= move)):
                    best_score, best_a, best_b = score, a, b
        if best_a < 0:
            continue
        i, j = inside[best_a], outside[best_b]
        energy += c[j] - c[i] - 2 * J[i, j]
        swap(J, C, i, j, c, totals)
        key ^= keys[i] ^ keys[j]
        inside[best_a], outside[best_b] = j, i
        gone[i], gone[j] = 0, 1
        free_from[i] = move + 5 + next_random(random) % 5
        free_from[j] = move + 3 + next_random(random) % 5
        if best_score < best - least_gain:
            best = best_score
            lowest[:] = inside
            last_improvement = move
    inside[:] = lowest
    return move
