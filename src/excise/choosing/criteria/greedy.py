"""Greedy removal by measurement, which SLEB and BlockPruner share: try each, remove the one that hurts least, again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from excise.choosing.criteria.selection import Spent
from excise.data.samples import Samples
from excise.measuring.measure import Measurements, measure
from excise.models.stack import Stack


@dataclass(frozen=True)
class GreedyOrder:
    """What a greedy descent found.

    Attributes:
        order: indices in the order of removal.
        scores: index → its score in the first round, on the intact model.
        trail: what had been spent when each of `order` was removed.

    """

    order: tuple[int, ...]
    scores: dict[int, float]
    trail: tuple[Spent, ...]


def greedy(
    stack: Stack,
    samples: Samples,
    rounds: int,
    pool: Callable[[Sequence[int]], Sequence[int]],
    score: Callable[[Measurements], np.ndarray],
    *,
    sublayers: bool = False,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> GreedyOrder:
    """Remove one unit a round, each time the one whose removal scores lowest given those already gone.

    Args:
        stack: the model.
        samples: calibration samples.
        rounds: units to remove.
        pool: units that may go next, given those already gone.
        score: [candidates] of measured removals; the lower index goes where scores tie.
        sublayers: units are sublayers (gates) instead of blocks.
        work: folder in which measurements are kept, so that an interrupted descent goes on.
        advance: called with tokens × candidates of each finished batch.

    """
    order: list[int] = []
    first_scores: dict[int, float] = {}
    trail: list[Spent] = []
    started, cost = time.perf_counter(), 0.0
    for _round in range(rounds):
        units = pool(order)
        trials = [tuple(sorted((*order, unit))) for unit in units]
        measured = measure(stack, samples, trials, sublayers=sublayers, ledger=work, advance=advance)
        scores = score(measured)
        cost += measured.forward_tokens
        first_scores = first_scores or dict(zip(units, map(float, scores), strict=True))
        order.append(units[int(np.argmin(np.where(np.isnan(scores), np.inf, scores)))])
        trail.append(Spent(cost, time.perf_counter() - started))
    return GreedyOrder(tuple(order), first_scores, tuple(trail))
