"""Angular distance (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024, arXiv 2403.17887).

d(ℓ, M) = mean over samples of arccos(cos(x^ℓ, x^{ℓ+M})) / π, where x^ℓ is the residual stream that enters block ℓ at
the last token. The window of M blocks with the smallest distance is removed, ℓ … ℓ+M−1.

Beyond the original: where a protected block interrupts a window, the window reaches over it, so that it still holds M
removable blocks; the distance is then across the whole reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import Rows
from excise.measuring.watched import block_hooks, watched
from excise.models.stack import Block


def angular_distance(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the consecutive blocks across which the residual stream turns least at the samples' last tokens.

    Returns:
        The window of smallest distance; `scores[ℓ]` is the distance of the window that starts at block ℓ.

    """
    stack, budget, candidates = context.stack, brief.budget, brief.candidates(context.stack)
    windows = [candidates[i : i + budget] for i in range(len(candidates) - budget + 1)]

    rows = watched(
        context, samples, "angular distance", {"windows": windows}, lambda batch: _LastTokens(batch, windows)
    )
    distances = rows["angles"].sum(axis=0) / len(samples)
    # NaN, from a stream that overflowed, would win argmin.
    chosen = windows[int(np.argmin(np.where(np.isnan(distances), np.inf, distances)))]
    scores: list[float | None] = [None] * len(stack.blocks)
    for window, distance in zip(windows, distances, strict=True):
        scores[window[0]] = float(distance)
    whole = chosen[-1] - chosen[0] + 1 == budget
    note = "" if whole else "the window reaches over protected blocks; the original knows none"
    cost = Cost(float(samples.tokens))
    return [Proposal("angular-distance", tuple(chosen), tuple(scores), cost=cost, note=note)]


@dataclass(frozen=True, eq=False)
class _LastTokens:
    """Residual streams [batch, width] at the last token: before each block, and after the last under index N."""

    batch: Batch
    windows: Sequence[Sequence[int]]
    streams: dict[int, Tensor] = field(default_factory=dict)

    def at(self, blocks: Sequence[Block]) -> AbstractContextManager[None]:
        return block_hooks(blocks, self._record)

    def rows(self) -> Rows:
        ends = [(self.streams[window[0]], self.streams[window[-1] + 1]) for window in self.windows]
        return {"angles": np.stack([_angles(*pair).cpu().numpy() for pair in ends], axis=1)}

    def _record(self, block: int, x_in: Tensor, x_out: Tensor) -> None:
        last = self.batch.lengths - 1
        rows = torch.arange(len(last))
        for place, x in ((block, x_in), (block + 1, x_out)):
            self.streams[place] = x[rows.to(x.device), last.to(x.device)].double()


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles [batch] between the rows of `a` and `b`, as a part of π."""
    cosine = torch.nn.functional.cosine_similarity(a, b.to(a.device), dim=-1)
    # Rounding takes cosines of almost equal streams beyond 1, where arccos is NaN.
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi
