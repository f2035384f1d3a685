"""95 % intervals: of rates and of their paired differences, and of means by bootstrap."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

# The ends of a 95 % interval rest on the outer 250 on either side.
REPLICATES = 10_000
CONFIDENCE = 0.95
# Standard errors on either side of a normal mean, at that confidence.
ERRORS = 1.959964

Interval = tuple[float, float]


def quantiles(values: NDArray[np.float64]) -> Interval:
    """The middle 95 % of replicates, of those that are numbers."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def wilson(passed: int, asked: int) -> Interval:
    """Interval of a rate, sensible for few questions and at 0 and 1 too.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).

    Args:
        passed: successes.
        asked: trials, at least one.

    Examples:
        >>> low, high = wilson(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.278)

    """
    rate, square = passed / asked, ERRORS**2
    centre = (rate + square / (2 * asked)) / (1 + square / asked)
    half = ERRORS / (1 + square / asked) * math.sqrt(rate * (1 - rate) / asked + square / (4 * asked**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(first: Bool[np.ndarray, " items"], second: Bool[np.ndarray, " items"]) -> Interval:
    """Interval of the rate of `first` less that of `second`, on the same questions.

    A bootstrap would say [0, 0] wherever all pairs are equal, however few they are.

    Source: Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired
    data (1998), method 10.
    """
    items = len(first)
    rates = float(first.mean()), float(second.mean())
    difference = rates[0] - rates[1]
    (low1, high1), (low2, high2) = wilson(int(first.sum()), items), wilson(int(second.sum()), items)
    phi = _phi(first, second)

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    below, above = reach(rates[0] - low1, high2 - rates[1]), reach(high1 - rates[0], rates[1] - low2)
    return difference - below, difference + above


def _phi(first: Bool[np.ndarray, " items"], second: Bool[np.ndarray, " items"]) -> float:
    """Correlation of two outcomes, towards 0 by the continuity correction where it is above."""
    items = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    one, other = int((first & ~second).sum()), int((~first & second).sum())
    margins = (both + one) * (other + neither) * (both + other) * (one + neither)
    if margins == 0:
        return 0.0
    excess = both * neither - one * other
    return (max(excess - items / 2, 0.0) if excess > 0 else excess) / math.sqrt(margins)


def resampled(
    values: Float[np.ndarray, " items"], weights: Float[np.ndarray, " items"], seed: int = 0
) -> NDArray[np.float64]:
    """Bootstrap replicates [replicates] of Σ values ÷ Σ weights over items; for means the weights are 1.

    The same seed gives the same resamples, so that differences of two calls are paired. A replicate without weight is
    NaN.
    """
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), REPLICATES)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts @ values) / (counts @ weights)
