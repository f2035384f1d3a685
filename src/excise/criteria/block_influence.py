"""Block influence (Men et al., ShortGPT, 2024, arXiv 2403.03853): 1 − mean over tokens of a block's cos(x_in, x_out).

One-shot as in the original, or iterative as the block-removal paper runs it: remove the least influential block,
measure again, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from excise.calibration.samples import Samples
from excise.criteria.selection import Selection, block_statistics, lowest, removable_blocks
from excise.models.stack import Stack


def one_shot(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the `budget` blocks of least influence, measured once.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to remove.
        protected: blocks that stay.
        seed: not used; nothing here is random.
        advance: called with tokens done.

    """
    candidates = removable_blocks(stack, budget, protected)
    statistics = block_statistics(stack, samples, advance=advance)
    influence = 1 - statistics.cosine
    return Selection(
        "block-influence",
        lowest(influence, budget, candidates),
        tuple(map(float, influence)),
        forward_tokens=statistics.forward_tokens,
    )


def iterative(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the least influential block, measure again, until `budget` blocks are gone."""
    candidates = removable_blocks(stack, budget, protected)
    order: list[int] = []
    cost, scores = 0.0, None
    for _round in range(budget):
        statistics = block_statistics(stack, samples, removed=order, advance=advance)
        influence = 1 - statistics.cosine
        scores = tuple(map(float, influence)) if scores is None else scores
        cost += statistics.forward_tokens
        order.append(
            lowest(np.where(np.isnan(influence), np.inf, influence), 1, [i for i in candidates if i not in order])[0]
        )
    return Selection("block-influence-iterative", tuple(sorted(order)), scores, tuple(order), cost)
