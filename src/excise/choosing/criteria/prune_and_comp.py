"""Prune&Comp (AAAI 2026, arXiv 2507.18212): block influence, iterated on the compensated model.

Removing a block leaves the blocks above it a stream of another magnitude. The compensation is one scalar per cut,

    α = mean over channels k of ‖Y_k‖₁ / ‖X_k‖₁,    X and Y the stream before and after the block, over all tokens,

by which the stream is multiplied where the block was; norms make that foldable into the weights below or above. Score,
drop one block, compensate, and score again. Here the scalars only choose; what repairs the choice is another matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from excise.choosing.brief import Brief
from excise.choosing.criteria.block_influence import one_by_one
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import Rows
from excise.measuring.watched import block_hooks, watched
from excise.models.stack import Block


def prune_and_comp(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the least influential block, compensate, measure again, until as many are gone as the brief wants."""
    return one_by_one("prune-and-comp", context, samples, brief, partial(_factor, context, samples))


def _factor(context: Context, samples: Samples, block: int, factors: Mapping[int, float]) -> float:
    """The scalar that makes up for a block, in the model compensated so far."""
    watch = [context.stack.blocks[block]]
    rows = watched(context, samples, "compensation", {"block": block}, _Channels, blocks=watch, factors=factors)
    before, after = (rows[name].sum(axis=0) for name in ("before", "after"))
    return float(np.mean(after / np.maximum(before, 1e-30)))


@dataclass(frozen=True, eq=False)
class _Channels:
    """‖·‖₁ of each channel [batch, width] before and after a block, over the real tokens of each sample."""

    batch: Batch
    sums: Rows = field(default_factory=dict)

    def at(self, blocks: Sequence[Block]) -> AbstractContextManager[None]:
        return block_hooks(blocks, self._record)

    def rows(self) -> Rows:
        return self.sums

    def _record(self, block: int, x_in: Tensor, x_out: Tensor) -> None:
        for name, stream in (("before", x_in), ("after", x_out)):
            real = self.batch.real.to(stream.device).unsqueeze(-1)
            self.sums[name] = stream.double().abs().where(real, 0.0).sum(dim=1).cpu().numpy()
