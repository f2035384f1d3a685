"""Means per token as what they are, ratios of sums over samples: their standard errors, and the same by domain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def ratio_error(values: Float[np.ndarray, " items"], weights: Float[np.ndarray, " items"]) -> float:
    """Standard error of Σ values ÷ Σ weights over items (the usual linearisation); infinite for fewer than two."""
    items = len(values)
    if items < 2:
        return float("inf")
    residual = values - values.sum() / weights.sum() * weights
    return float(np.sqrt(items / (items - 1) * (residual**2).sum()) / weights.sum())


def by_domain(
    values: Float[np.ndarray, " items"], weights: Float[np.ndarray, " items"], domains: Sequence[str]
) -> dict[str, float]:
    """Σ values ÷ Σ weights in each domain."""
    names = np.array(domains)
    groups = {name: names == name for name in dict.fromkeys(domains)}
    return {name: float(values[group].sum() / weights[group].sum()) for name, group in groups.items()}


def worst_domain(
    values: Float[np.ndarray, " items"], weights: Float[np.ndarray, " items"], domains: Sequence[str]
) -> float:
    """The largest Σ values ÷ Σ weights of a domain, each drawn towards that of all as far as its items may be luck.

    Of many domains with two or three items the largest is that of the unluckiest texts. Drawn towards the mean by
    τ² / (τ² + e²), e² being a domain's squared error and τ² what is left of the spread over domains without errors
    (empirical Bayes: Efron and Morris, JASA 70, 1975). With one domain, or as many as items, that of all.
    """
    everyone, found = values.sum() / weights.sum(), by_domain(values, weights, domains)
    spare = len(values) - len(found)
    if len(found) < 2 or spare < 1:
        return float(everyone)
    means = np.array(list(found.values()))
    place = np.array([list(found).index(name) for name in domains])
    variance = ((values - means[place] * weights) ** 2).sum() / spare
    errors = variance * np.bincount(place) / np.bincount(place, weights) ** 2
    between = max(0.0, float(means.var(ddof=1) - errors.mean()))
    # Where nothing tells domains apart, neither spread nor error, they are all the mean.
    shares = np.divide(between, between + errors, out=np.zeros_like(errors), where=between + errors > 0)
    return float((everyone + shares * (means - everyone)).max())
