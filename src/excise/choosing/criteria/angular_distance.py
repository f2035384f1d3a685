"""Angular distance (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024, arXiv 2403.17887).

d(ℓ, M) = mean over samples of arccos(cos(x^ℓ, x^{ℓ+M})) / π, where x^ℓ is the residual stream that enters block ℓ at
the last token. The window of M blocks with the smallest distance is removed, ℓ … ℓ+M−1.

Beyond the original: where a protected block interrupts a window, the window reaches over it, so that it still holds M
removable blocks; the distance is then across the whole reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from excise.choosing.criteria.selection import Selection, block_hooks, removable_blocks
from excise.data.batches import Batch, default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.models.stack import Stack


def angular_distance(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the `budget` consecutive blocks across which the residual stream turns least.

    Args:
        stack: the model.
        samples: calibration samples; the last token of each is looked at.
        budget: number of blocks to remove, the width of the windows.
        protected: blocks that stay.
        seed: not used; nothing here is random.
        work: not used; one pass is not resumed.
        advance: called with tokens done.

    Returns:
        The window of smallest distance; `scores[ℓ]` is the distance of the window that starts at block ℓ.

    """
    candidates = removable_blocks(stack, budget, protected)
    windows = [candidates[i : i + budget] for i in range(len(candidates) - budget + 1)]
    distances = np.zeros(len(windows))
    for batch in make_batches(samples, default_batch_tokens(stack)):
        streams = _last_token_streams(stack, batch)
        for i, window in enumerate(windows):
            distances[i] += _angles(streams[window[0]], streams[window[-1] + 1]).sum().item()
        if advance:
            advance(batch.tokens)
    distances /= len(samples)
    chosen = windows[int(np.argmin(np.where(np.isnan(distances), np.inf, distances)))]
    scores: list[float | None] = [None] * len(stack.blocks)
    for window, distance in zip(windows, distances, strict=True):
        scores[window[0]] = float(distance)
    whole = chosen[-1] - chosen[0] + 1 == budget
    return Selection(
        "angular-distance",
        tuple(chosen),
        tuple(scores),
        forward_tokens=samples.tokens,
        note="" if whole else "the window reaches over protected blocks; the original knows none",
    )


@torch.no_grad()
def _last_token_streams(stack: Stack, batch: Batch) -> dict[int, Tensor]:
    """Residual stream [batch, width] at the last token: before each block, and after the last under index N."""
    batch = batch.to(stack.device)
    streams: dict[int, Tensor] = {}
    with block_hooks(stack.blocks, partial(_keep_last_token, streams, batch.lengths - 1)):
        stack.hidden(batch.input_ids)
    return streams


def _keep_last_token(streams: dict[int, Tensor], last: Tensor, block: int, x_in: Tensor, x_out: Tensor) -> None:
    rows = torch.arange(len(last))
    for place, x in ((block, x_in), (block + 1, x_out)):
        streams[place] = x[rows.to(x.device), last.to(x.device)].double()


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles [batch] between the rows of `a` and `b`, as a part of π."""
    cosine = torch.nn.functional.cosine_similarity(a, b.to(a.device), dim=-1)
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi
