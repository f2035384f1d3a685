"""Greedy removal by measurement, which SLEB and BlockPruner share: try each, remove the one that hurts least, again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from excise.choosing.proposal import Cost, Meter
from excise.context import Context
from excise.data.samples import Samples
from excise.measuring.measure import Measurements, measure


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
    trail: tuple[Cost, ...]


def greedy(
    context: Context,
    samples: Samples,
    rounds: int,
    pool: Callable[[Sequence[int]], Sequence[int]],
    score: Callable[[Measurements], np.ndarray],
    *,
    sublayers: bool = False,
) -> GreedyOrder:
    """Remove one unit per round, each time the one whose removal scores lowest given those already gone.

    Args:
        context: the model and the store.
        samples: calibration samples.
        rounds: units to remove.
        pool: units that may go next, given those already gone.
        score: [candidates] of measured removals; the lower index goes where scores tie.
        sublayers: units are sublayers (gates) instead of blocks.

    """
    order: list[int] = []
    first_scores: dict[int, float] = {}
    trail: list[Cost] = []
    meter, cost = Meter(context), 0.0
    for _round in range(rounds):
        units = pool(order)
        trials = [tuple(sorted((*order, unit))) for unit in units]
        measured = measure(context, samples, trials, sublayers=sublayers)
        scores = score(measured)
        cost += measured.forward_tokens
        # Scores of the first round rank blocks of the intact model; later ones depend on what is gone.
        first_scores = first_scores or dict(zip(units, map(float, scores), strict=True))
        order.append(units[int(np.argmin(np.where(np.isnan(scores), np.inf, scores)))])
        trail.append(meter.cost(cost))
    return GreedyOrder(tuple(order), first_scores, tuple(trail))
