"""Prune&Comp (AAAI 2026, arXiv 2507.18212): block influence, iterated on the compensated model.

Removing a block leaves the blocks above it a stream of another magnitude. The compensation is one scalar per cut,

    α = mean over channels k of ‖Y_k‖₁ / ‖X_k‖₁,    X and Y the stream before and after the block, over all tokens,

by which the stream is multiplied where the block was; norms make that foldable into the weights below or above. Score,
drop one block, compensate, and score again. Here the scalars only choose; what repairs the choice is another matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from excise.choosing.brief import Brief
from excise.choosing.criteria.block_influence import one_by_one
from excise.choosing.criteria.statistics import block_hooks, compensated
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import total


def prune_and_comp(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the least influential block, compensate, measure again, until as many are gone as the brief wants."""
    return one_by_one("prune-and-comp", context, samples, brief, partial(_factor, context, samples))


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
