"""Prune&Comp (AAAI 2026, arXiv 2507.18212): block influence, iterated on the compensated model.

Removing a block leaves the blocks above it a stream of another magnitude. The compensation is one scalar per cut,

    α = mean over channels k of ‖Y_k‖₁ / ‖X_k‖₁,    X and Y the stream before and after the block, over all tokens,

by which the stream is multiplied where the block was; norms make that foldable into the weights below or above. Score,
drop one block, compensate, and score again. Here the scalars only choose; what repairs the choice is another matter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from excise.choosing.brief import Brief
from excise.choosing.criteria.statistics import block_hooks, block_statistics, compensated
from excise.choosing.proposal import Cost, Meter, Proposal, lowest
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import total


def prune_and_comp(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the least influential block, compensate, measure again, until as many are gone as the brief wants."""
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
        factors[least] = _factor(context, samples, least, factors)
        cost += 2 * statistics.forward_tokens
        trail.append(meter.cost(cost))
    order = tuple(factors)
    return [Proposal("prune-and-comp", tuple(sorted(order)), scores, order, cost=trail[-1], trail=tuple(trail))]


def _factor(context: Context, samples: Samples, block: int, factors: Mapping[int, float]) -> float:
    """The scalar that makes up for a block, in the model compensated so far."""
    stack = context.stack

    @torch.no_grad()
    def terms_of(number: int, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def record(index: int, x_in: Tensor, x_out: Tensor) -> None:
            for name, stream in (("before", x_in), ("after", x_out)):
                found[name] = stream[batch.real.to(stream.device)].double().abs().sum(dim=0)

        with compensated(stack, factors), block_hooks([stack.blocks[block]], record):
            stack.model.base_model(input_ids=batch.input_ids, use_cache=False)
        return found

    sums = total(context, samples, "compensation", terms_of)
    return float(np.mean((sums["after"] / sums["before"].clamp(min=1e-30)).cpu().numpy()))
