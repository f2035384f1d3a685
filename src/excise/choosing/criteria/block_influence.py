"""Block influence (Men et al., ShortGPT, 2024, arXiv 2403.03853): 1 − mean over tokens of a block's cos(x_in, x_out).

One-shot as in the original, or iterative as the block-removal paper runs it: remove the least influential block,
measure again, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from excise.choosing.brief import Brief
from excise.choosing.criteria.statistics import block_statistics
from excise.choosing.proposal import Cost, Meter, Proposal, by_scores, lowest
from excise.context import Context
from excise.data.samples import Samples

FactorOf = Callable[[int, Mapping[int, float]], float]


def one_shot(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the blocks of least influence, measured once."""
    statistics = block_statistics(context, samples)
    return [by_scores("block-influence", 1 - statistics.cosine, brief, context, Cost(statistics.forward_tokens))]


def iterative(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the least influential block, measure again, until as many are gone as the brief wants."""
    return one_by_one("block-influence-iterative", context, samples, brief)


def one_by_one(
    method: str, context: Context, samples: Samples, brief: Brief, factor_of: FactorOf | None = None
) -> list[Proposal]:
    """Remove the least influential block, measure again, and so on.

    Args:
        method: name of the criterion.
        context: the model and the store.
        samples: calibration samples.
        brief: how many go.
        factor_of: (block, factors of those gone) → what the stream is multiplied by where the block was, for which a
            pass more is charged; None multiplies by nothing.

    """
    candidates, meter = brief.candidates(context.stack), Meter(context)
    factors: dict[int, float] = {}
    trail: list[Cost] = []
    cost, scores = 0.0, None
    for _round in range(brief.budget):
        statistics = block_statistics(context, samples, factors=factors)
        influence = 1 - statistics.cosine
        # Of the first round only: later ones are of a model with blocks missing.
        scores = tuple(map(float, influence)) if scores is None else scores
        (least,) = lowest(influence, 1, [i for i in candidates if i not in factors])
        factors[least] = 1.0 if factor_of is None else factor_of(least, factors)
        cost += statistics.forward_tokens * (1 if factor_of is None else 2)
        trail.append(meter.cost(cost))
    order = tuple(factors)
    return [Proposal(method, tuple(sorted(order)), scores, order, cost=trail[-1], trail=tuple(trail))]
