"""Norm ratio (Ministral 3, Algorithm 2, 2026, arXiv 2601.08584): mean over tokens of ‖x_out‖ / ‖x_in‖ of a block.

The blocks with the smallest ratio are removed, in one shot. The report's prose states the inverse ratio; its
pseudocode, and the block-removal paper's use of it, divide output by input, as here.
"""

from __future__ import annotations

from excise.choosing.brief import Brief
from excise.choosing.criteria.statistics import block_statistics
from excise.choosing.proposal import Cost, Proposal, by_scores
from excise.context import Context
from excise.data.samples import Samples


def norm_ratio(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the blocks that lengthen the residual stream least."""
    statistics = block_statistics(context, samples)
    return [by_scores("norm-ratio", statistics.norm_ratio, brief, context, Cost(statistics.forward_tokens))]
