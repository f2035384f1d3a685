"""Simulated annealing with the swap moves of tabu search, and the same pool of every improving swap evaluated."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from excise.ising.problem import Problem
from excise.ising.solvers.base import Deadline, make_spectrum, removed_sets
from excise.ising.solvers.kernels import (
    contents,
    inner_kernel,
    kernel,
    new_pool,
    next_random,
    random_state,
    threshold,
    zobrist,
)
from excise.ising.solvers.places import misplaced, open_states
from excise.ising.solvers.swaps import first_state, penalised, random_subset, record, swap, violation
from excise.ising.spectrum import Spectrum


@dataclass(frozen=True)
class Annealing:
    """Simulated annealing at fixed magnetisation; proves nothing.

    Args:
        restarts: Number of anneals, for each number of removed units.
        sweeps: Temperatures per anneal; each tries N swaps.
        hottest: First temperature, in units of the mean size of a random swap's change of energy.
        coldest: Last temperature, in the same unit; between them it falls geometrically.

    """

    restarts: int = 50
    sweeps: int = 300
    hottest: float = 1.0
    coldest: float = 1e-3
    name: str = "annealing"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return the `states` lowest states seen. The same seed gives the same result unless time runs out."""
        started, deadline = time.perf_counter(), Deadline.after(time_limit)
        total, n = problem.number_of_states(), len(problem.free)
        pool, random = new_pool(min(states, total), n), random_state(seed)
        temperatures = np.geomspace(self.hottest, self.coldest, self.sweeps)
        tried = 0
        notes: tuple[str, ...] = ()
        try:
            for count in problem.counts():
                reduced = problem.reduced(count)
                penalty, C, bounds = penalised(reduced)
                ordered = reduced.places.shape[1] > 0
                drawn = open_states(reduced, self.restarts, random) if ordered else [()] * self.restarts
                for start in drawn:
                    tried += _one_anneal(
                        reduced.h,
                        reduced.J,
                        reduced.count,
                        np.array([*start, *sorted(set(range(n)) - set(start))], dtype=np.int64),
                        not ordered,
                        temperatures,
                        random,
                        pool,
                        zobrist(n),
                        C,
                        bounds,
                        penalty,
                        reduced.places,
                    )
                    if deadline.passed():
                        notes = ("time limit reached",)
                        break
        except KeyboardInterrupt:
            notes = ("interrupted",)
        _, masks = contents(pool)
        return make_spectrum(
            problem,
            removed_sets(problem, masks),
            states,
            solver=self.name,
            seconds=time.perf_counter() - started,
            evaluated=tried,
            seed=seed,
            complete=len(masks) == total < states,
            notes=notes,
        )


@inner_kernel
def _uniform(random):  # type: ignore[no-untyped-def]
    return (next_random(random) >> 10) * (1.0 / (1 << 53))


@kernel
def _one_anneal(h, J, count, units, shuffle, temperatures, random, pool, keys, C, bounds, penalty, places):  # type: ignore[no-untyped-def]
    n = len(h)
    ordered = places.shape[1] > 0
    if shuffle:
        random_subset(units, count, random)
    inside, outside = units[:count], units[count:]
    c, energy, key, totals, gone, present = first_state(h, J, inside, pool, keys, C, bounds, places)
    if count == 0 or count == n:
        return 1
    size = 0.0  # mean size of a swap's change of energy
    for a in range(count):
        for b in range(n - count):
            size += abs(c[outside[b]] - c[inside[a]] - 2 * J[inside[a], outside[b]]) / (count * (n - count))
    for temperature in temperatures:
        for _ in range(n):
            a, b = next_random(random) % count, next_random(random) % (n - count)
            i, j = inside[a], outside[b]
            change = c[j] - c[i] - 2 * J[i, j]
            after = 0.0
            if ordered or len(bounds) > 0:
                after = violation(C, bounds, totals, i, j) + misplaced(places, gone, i, j)
            if after == 0.0 and energy + change < threshold(pool):
                record(pool, energy + change, key ^ keys[i] ^ keys[j], inside, i, j)
            score = change + penalty * (after - present)
            if score > 0 and _uniform(random) >= np.exp(-score / (temperature * size + 1e-300)):
                continue
            energy += change
            present = after
            swap(J, C, i, j, c, totals)
            key ^= keys[i] ^ keys[j]
            inside[a], outside[b] = j, i
            gone[i], gone[j] = 0, 1
    return len(temperatures) * n
