"""A condition on the order of what stays: some units may stay only at some places of a repeating pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """A condition on the order of what stays: unit i may stay only at some of the places of a repeating pattern.

    The place of a unit that stays is the number of those below it that stay, counted modulo the period p.

    Args:
        allowed: [N, p], whether unit i may stay at each place.
        name: How errors name it.

    Raises:
        InputError: no units, or their places differ in number.

    >>> alternating = Pattern(((True, False), (False, True), (True, False), (False, True)))
    >>> alternating.holds((1, 2)), alternating.holds((1,))
    (True, False)

    """

    allowed: tuple[tuple[bool, ...], ...]
    name: str = "pattern"

    def __post_init__(self) -> None:
        if len({len(places) for places in self.allowed}) != 1 or not self.period:
            raise InputError(f"{self.name}: expected as many places, 1 or more, for every unit")

    @property
    def period(self) -> int:
        """Number of places p."""
        return len(self.allowed[0])

    def both(self, other: Pattern) -> Pattern:
        """The condition that this pattern and another one of as many units are kept."""
        period = math.lcm(self.period, other.period)
        rows = (
            tuple(mine[c % len(mine)] and theirs[c % len(theirs)] for c in range(period))
            for mine, theirs in zip(self.allowed, other.allowed, strict=True)
        )
        return Pattern(tuple(rows), name=f"{self.name} and {other.name}")

    def holds(self, removed: Iterable[int]) -> bool:
        """Whether every unit that stays is allowed where it then stands."""
        gone = set(removed)
        kept = (places for i, places in enumerate(self.allowed) if i not in gone)
        return all(places[count % self.period] for count, places in enumerate(kept))


def open_places(pattern: Pattern | None, free: Sequence[int], forced: Sequence[int]) -> NDArray[np.bool_]:
    """A pattern as a condition on the free units alone: a path through these places is an allowed state.

    Protected units are minded with the free unit below them, those at the very bottom with the first.

    Args:
        pattern: Over all units.
        free: Units that are neither protected nor forced, ascending, [n].
        forced: Units that are removed.

    Returns:
        Entry [x, k, j] says whether free unit k may have the value x (1: removed) when j of the free units below it
        stay, [2, n, n + 1]; without a pattern [2, 0, 1].

    """
    if pattern is None:
        return np.ones((2, 0, 1), dtype=bool)
    n, units, period = len(free), len(pattern.allowed), pattern.period
    stands = np.array(pattern.allowed)
    gone = set(forced)
    places = np.ones((2, n, n + 1), dtype=bool)
    bounds = [*free, units]
    below = [i for i in range(bounds[0]) if i not in gone]  # protected
    at_bottom = all(stands[i, place % period] for place, i in enumerate(below))
    kept = len(below)  # protected units so far
    for k in range(n):
        above = [i for i in range(free[k] + 1, bounds[k + 1]) if i not in gone]
        for j in range(n + 1):
            stays = stands[free[k], (kept + j) % period]
            places[0, k, j] = stays and all(stands[i, (kept + j + 1 + a) % period] for a, i in enumerate(above))
            places[1, k, j] = all(stands[i, (kept + j + a) % period] for a, i in enumerate(above))
        kept += len(above)
    if n and not at_bottom:
        places[:, 0] = False
    return places


def completions(places: NDArray[np.bool_], kept: int) -> list[list[int]]:
    """How many ways lead from each point to the top: entry [k][j] is for the units from k on, j below it kept.

    Args:
        places: As `open_places` gives them, for n units.
        kept: How many of the n units stay in the end.

    """
    n = places.shape[1]
    ways = [[0] * (n + 2) for _ in range(n + 1)]
    ways[n][kept] = 1
    for k in reversed(range(n)):
        for j in range(k + 1):
            stays = ways[k + 1][j + 1] if places[0, k, j] else 0
            goes = ways[k + 1][j] if places[1, k, j] else 0
            ways[k][j] = stays + goes
    return ways
