"""The one pass over block inputs and outputs that several criteria share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import Rows, each_batch
from excise.models.stack import (
    Block,
    Stack,
    block_input,
    block_output,
    first,
    override_forward,
    removable_indices,
)
from excise.plain import Facts


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
    """Measure every block's input and output in one pass, on hooks.

    Hooks rather than `output_hidden_states`: its last entry stands after the final norm, which distorts the last block.

    Args:
        context: the model and the store, in which the pass is found again.
        samples: calibration samples; every real token counts once.
        factors: blocks bypassed meanwhile, and by what the stream is multiplied where they were.

    """
    stack = context.stack
    scales = factors or {}
    removed = removable_indices(stack, list(scales))
    alive = [block for block in stack.blocks if block.index not in removed]

    @torch.no_grad()
    def sums_of(number: int, batch: Batch) -> Rows:
        # NaN for bypassed blocks, so that nobody takes their missing influence for the least.
        sums = {name: np.full((len(batch.indices), len(stack.blocks)), np.nan) for name in ("cosine", "norm_ratio")}
        record = partial(_record, sums, batch.real)
        with compensated(stack, scales), block_hooks(alive, record):
            stack.model.base_model(input_ids=batch.input_ids, use_cache=False)
        return sums

    key = {"removed": [[block, scales[block]] for block in removed]}
    rows = each_batch(context, samples, "block statistics", key, sums_of)
    cosine, norm_ratio = (rows[name].sum(axis=0) / samples.tokens for name in ("cosine", "norm_ratio"))
    return BlockStatistics(cosine, norm_ratio, samples.tokens * len(alive) / len(stack.blocks))


def _record(sums: Rows, real: Tensor, block: int, x_in: Tensor, x_out: Tensor) -> None:
    # 1 − cos is small for the blocks in question, and below 1 bfloat16 goes in steps of 0.004.
    before, after = x_in.double(), x_out.double()
    norm_in, norm_out = before.norm(dim=-1), after.norm(dim=-1)
    counted = real.to(x_in.device)
    for name, values in (
        ("cosine", (before * after).sum(dim=-1) / (norm_in * norm_out)),
        ("norm_ratio", norm_out / norm_in),
    ):
        sums[name][:, block] = values.where(counted, 0.0).sum(dim=-1).cpu().numpy()


def compensated(stack: Stack, factors: Mapping[int, float]) -> contextlib.AbstractContextManager[None]:
    """Context in which blocks are bypassed, and the stream is multiplied by a factor where each was."""

    def through(factor: float) -> Callable[..., Any]:
        return lambda *args, **kwargs: block_output(stack, factor * block_input(args, kwargs))

    return override_forward({stack.blocks[block].module: through(factor) for block, factor in factors.items()})


@contextlib.contextmanager
def block_hooks(blocks: Sequence[Block], record: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which `record(index, x_in, x_out)` sees the residual stream before and after each of `blocks`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Facts, output: Tensor, block: int) -> None:
        record(block, block_input(args, kwargs), first(output))

    handles = [
        block.module.register_forward_hook(partial(hook, block=block.index), with_kwargs=True) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
