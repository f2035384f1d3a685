"""Block influence (Men et al., ShortGPT, 2024, arXiv 2403.03853): 1 − mean over tokens of a block's cos(x_in, x_out).

One-shot as in the original, or iterative as the block-removal paper runs it: remove the least influential block,
measure again, and so on.
"""

from __future__ import annotations

from excise.choosing.brief import Brief
from excise.choosing.criteria.statistics import block_statistics
from excise.choosing.proposal import Cost, Meter, Proposal, by_scores, lowest
from excise.context import Context
from excise.data.samples import Samples


def one_shot(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the blocks of least influence, measured once."""
    statistics = block_statistics(context, samples)
    return [by_scores("block-influence", 1 - statistics.cosine, brief, context, Cost(statistics.forward_tokens))]


def iterative(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the least influential block, measure again, until as many are gone as the brief wants."""
    candidates, meter = brief.candidates(context.stack), Meter(context)
    order: list[int] = []
    trail: list[Cost] = []
    cost, scores = 0.0, None
    for _round in range(brief.budget):
        statistics = block_statistics(context, samples, removed=order)
        influence = 1 - statistics.cosine
        # Of the first round only: later ones are of a model with blocks missing.
        scores = tuple(map(float, influence)) if scores is None else scores
        cost += statistics.forward_tokens
        order.append(lowest(influence, 1, [i for i in candidates if i not in order])[0])
        trail.append(meter.cost(cost))
    removed = tuple(sorted(order))
    return [
        Proposal("block-influence-iterative", removed, scores, tuple(order), cost=trail[-1], trail=tuple(trail)),
    ]
