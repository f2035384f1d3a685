"""BlockPruner (Zhong et al., 2024, arXiv 2406.10594): greedy over sublayers, by perplexity with one sublayer off.

A sublayer method: attention and feed-forward go separately, so its results carry gate indices (`Proposal.sublayers`).
For comparison at a budget of M blocks it removes as many sublayers as M blocks have, 2M in a usual stack; what it
removes is measured with those gates off. Fewer parameters may go than with M whole blocks, if it prefers attention.

Beyond the original: candidates that share their lowest blocks share the computation of those, which changes cost only.
"""

from __future__ import annotations

import numpy as np

from excise.choosing.brief import Brief
from excise.choosing.criteria.greedy import greedy
from excise.choosing.proposal import Proposal, sublayer_budget, sublayer_proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.measuring.measure import Measurements


def block_pruner(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the sublayers of M blocks' worth, one at a time, each the one whose absence costs least perplexity."""
    stack, candidates = context.stack, brief.candidates(context.stack)
    gates = [sublayer.gate for sublayer in stack.sublayers if sublayer.block in candidates]
    result = greedy(
        context,
        samples,
        min(sublayer_budget(stack, brief.budget), len(gates)),
        lambda gone: [gate for gate in gates if gate not in gone],
        _perplexity,
        sublayers=True,
    )
    scores = tuple(result.scores.get(sublayer.gate) for sublayer in stack.sublayers)
    return [sublayer_proposal("block-pruner", stack, result.order, scores, result.trail[-1], result.trail)]


def _perplexity(measured: Measurements) -> np.ndarray:
    return np.exp(measured.losses)
