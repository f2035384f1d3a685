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
