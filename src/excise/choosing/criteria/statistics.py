"""The one pass over block inputs and outputs that several criteria share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import Rows
from excise.measuring.watched import block_hooks, watched
from excise.models.stack import Block, removable_indices


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Means over tokens of what blocks do to the residual stream; NaN for bypassed blocks.

    Attributes:
        cosine: [blocks], cos(x_in, x_out).
        norm_ratio: [blocks], ‖x_out‖ / ‖x_in‖.
        forward_tokens: cost.

    """

    cosine: Float[np.ndarray, " blocks"]
    norm_ratio: Float[np.ndarray, " blocks"]
    forward_tokens: float


def block_statistics(
    context: Context, samples: Samples, *, factors: Mapping[int, float] | None = None
) -> BlockStatistics:
    """Measure every block's input and output in one pass.

    Args:
        context: the model and the store, in which the pass is found again.
        samples: calibration samples; every real token counts once.
        factors: blocks bypassed meanwhile, and by what the stream is multiplied where they were.

    """
    blocks = len(context.stack.blocks)
    removed = removable_indices(context.stack, list(factors or {}))
    rows = watched(
        context, samples, "block statistics", {}, lambda batch: _Statistics.of(batch, blocks), factors=factors
    )
    cosine, norm_ratio = (rows[name].sum(axis=0) / samples.tokens for name in ("cosine", "norm_ratio"))
    return BlockStatistics(cosine, norm_ratio, samples.tokens * (blocks - len(removed)) / blocks)


@dataclass(frozen=True, eq=False)
class _Statistics:
    """Sums over the real tokens of each sample; NaN for blocks not seen, whose influence is not the least."""

    batch: Batch
    sums: Rows = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch, blocks: int) -> _Statistics:
        names = ("cosine", "norm_ratio")
        return _Statistics(batch, {name: np.full((len(batch.indices), blocks), np.nan) for name in names})

    def at(self, blocks: Sequence[Block]) -> AbstractContextManager[None]:
        return block_hooks(blocks, self._record)

    def rows(self) -> Rows:
        return self.sums

    def _record(self, block: int, x_in: Tensor, x_out: Tensor) -> None:
        # 1 − cos is small for the blocks in question, and below 1 bfloat16 goes in steps of 0.004.
        before, after = x_in.double(), x_out.double()
        norm_in, norm_out = before.norm(dim=-1), after.norm(dim=-1)
        counted = self.batch.real.to(x_in.device)
        for name, values in (
            ("cosine", (before * after).sum(dim=-1) / (norm_in * norm_out)),
            ("norm_ratio", norm_out / norm_in),
        ):
            self.sums[name][:, block] = values.where(counted, 0.0).sum(dim=-1).cpu().numpy()
