"""Path relinking: from one good state towards another, and from between them the next start of a tabu search.

Glover, Laguna and Martí, Control and Cybernetics 29 (2000). Beyond a hundred units the lowest valley is rarely met by
random starts, while good states of different valleys often agree on the units that matter.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from excise.ising.problem import Reduced
from excise.ising.solvers.swaps import penalised

Units = tuple[int, ...]

ELITE = 10
# Of the way: nearer to an end, tabu search falls back to it.
AWAY = 0.25


class Elite:
    """The best states of different searches, lowest first, of which pairs are relinked."""

    def __init__(self, reduced: Reduced) -> None:
        self.reduced = reduced
        self.penalty, self.C, self.bounds = penalised(reduced)
        self.states: list[tuple[float, Units]] = []
        self._tried: set[tuple[Units, Units]] = set()

    def add(self, units: NDArray[np.int64]) -> None:
        """Take the state that a search ended with, [count], if it is new and among the lowest."""
        state = tuple(sorted(units.tolist()))
        chosen = np.array(state, dtype=np.int64)
        energy = self.reduced.h[chosen].sum() + self.reduced.J[np.ix_(chosen, chosen)].sum()
        missing = np.maximum(0.0, self.bounds - self.C[:, chosen].sum(axis=1)).sum()
        entry = (float(energy + self.penalty * missing), state)
        if entry not in self.states:
            bisect.insort(self.states, entry)
            del self.states[ELITE:]

    def starts(self) -> Iterator[Units]:
        """States between two of the elite, the lowest first, until every pair of those it holds by then is tried."""
        while pair := self._next_pair():
            self._tried.add(pair)
            if between := relinked(self.reduced, *pair):
                yield between

    def _next_pair(self) -> tuple[Units, Units] | None:
        states = [state for _, state in self.states]
        return next((pair for pair in itertools.permutations(states, 2) if pair not in self._tried), None)


def relinked(reduced: Reduced, start: Units, end: Units) -> Units | None:
    """The lowest state on the middle of a path of swaps from one state to another, each step the least ascent.

    Args:
        reduced: the problem.
        start: free units that the first state removes.
        end: of the second, as many.

    Returns:
        Free units that the state between them removes; None where they are too near to have a middle.

    """
    h, J = reduced.h, reduced.J
    out, into = sorted({*start} - {*end}), sorted({*end} - {*start})
    length = len(out)
    near = max(1, int(AWAY * length))
    x = np.zeros(len(h))
    x[list(start)] = 1
    diagonal = np.diag(J)
    # What adding each unit costs, or removing it saves.
    marginals = h + diagonal + 2 * (J @ x - diagonal * x)
    climbed, lowest = 0.0, np.inf
    best: Units | None = None
    for step in range(1, length - near + 1):
        costs = marginals[into] - marginals[out][:, None] - 2 * J[np.ix_(out, into)]
        row, column = np.unravel_index(costs.argmin(), costs.shape)
        gone, come = out.pop(row), into.pop(column)
        climbed += costs[row, column]
        x[gone], x[come] = 0, 1
        marginals += 2 * (J[:, come] - J[:, gone])
        marginals[come] -= 2 * diagonal[come]
        marginals[gone] += 2 * diagonal[gone]
        if step >= near and climbed < lowest:
            lowest, best = climbed, tuple(np.flatnonzero(x).tolist())
    return best
