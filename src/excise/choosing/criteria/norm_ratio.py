"""Norm ratio (Ministral 3, Algorithm 2, 2026, arXiv 2601.08584): mean over tokens of ‖x_out‖ / ‖x_in‖ of a block.

The blocks with the smallest ratio are removed, in one shot. The report's prose states the inverse ratio; its
pseudocode, and the block-removal paper's use of it, divide output by input, as here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from excise.choosing.criteria.selection import Selection, block_statistics, lowest, ranking, removable_blocks
from excise.data.samples import Samples
from excise.models.stack import Stack


def norm_ratio(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the `budget` blocks that lengthen the residual stream least.

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
    return Selection(
        "norm-ratio",
        lowest(statistics.norm_ratio, budget, candidates),
        tuple(map(float, statistics.norm_ratio)),
        ranking(statistics.norm_ratio, budget, candidates),
        forward_tokens=statistics.forward_tokens,
        reused_seconds=statistics.reused_seconds,
    )
