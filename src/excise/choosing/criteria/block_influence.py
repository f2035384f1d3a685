"""Block influence (Men et al., ShortGPT, 2024, arXiv 2403.03853): 1 − mean over tokens of a block's cos(x_in, x_out).

One-shot as in the original, or iterative as the block-removal paper runs it: remove the least influential block,
measure again, and so on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from excise.choosing.criteria.selection import Selection, Spent, block_statistics, lowest, ranking, removable_blocks
from excise.data.samples import Samples
from excise.models.stack import Stack


def one_shot(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the `budget` blocks of least influence, measured once.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to remove.
        protected: blocks that stay.
        seed: not used; nothing here is random.
        work: not used; one pass is not resumed.
        advance: called with tokens done.

    """
    candidates = removable_blocks(stack, budget, protected)
    statistics = block_statistics(stack, samples, advance=advance)
    influence = 1 - statistics.cosine
    return Selection(
        "block-influence",
        lowest(influence, budget, candidates),
        tuple(map(float, influence)),
        ranking(influence, budget, candidates),
        forward_tokens=statistics.forward_tokens,
        reused_seconds=statistics.reused_seconds,
    )


def iterative(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the least influential block, measure again, until `budget` blocks are gone."""
    candidates = removable_blocks(stack, budget, protected)
    order: list[int] = []
    trail: list[Spent] = []
    started, cost, reused, scores = time.perf_counter(), 0.0, 0.0, None
    for _round in range(budget):
        statistics = block_statistics(stack, samples, removed=order, advance=advance)
        influence = 1 - statistics.cosine
        scores = tuple(map(float, influence)) if scores is None else scores
        cost += statistics.forward_tokens
        reused += statistics.reused_seconds
        order.append(lowest(influence, 1, [i for i in candidates if i not in order])[0])
        trail.append(Spent(cost, time.perf_counter() - started + reused))
    return Selection("block-influence-iterative", tuple(sorted(order)), scores, tuple(order), cost, trail=tuple(trail))
