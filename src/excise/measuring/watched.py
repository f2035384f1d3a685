"""Passes that look at the residual stream before and after blocks, in one forward pass or block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.measuring.passes import Rows, each_batch
from excise.measuring.sweep import Streams, alone, embedded
from excise.models.stack import (
    Block,
    Stack,
    block_input,
    block_output,
    first,
    override_forward,
    pass_through,
)
from excise.plain import Facts, Values


class Watch(Protocol):
    """What is looked at while one batch passes through blocks."""

    def at(self, blocks: Sequence[Block]) -> AbstractContextManager[None]:
        """Context in which some blocks are watched."""
        ...

    def rows(self) -> Rows:
        """What was seen, arrays [batch, …], once every block was passed."""
        ...


def watched(
    context: Context,
    samples: Samples,
    kind: str,
    key: Values,
    watch_of: Callable[[Batch], Watch],
    *,
    blocks: Sequence[Block] = (),
    factors: Mapping[int, float] | None = None,
) -> Rows:
    """Watch blocks on every sample, kept batch by batch; a model that waits on disk is read once.

    Args:
        context: the model and the store.
        samples: what to pass over.
        kind: name of the stage, see `excise.measuring.passes.each_batch`.
        key: what the rows depend on beside the model, the samples and `factors`.
        watch_of: batch on the model's device → who watches.
        blocks: those that are watched, ascending; all but the bypassed ones by default. What lies above is not run.
        factors: blocks bypassed meanwhile, and by what the stream is multiplied where they were.

    Returns:
        The arrays, [samples, …] in the samples' order.

    """
    stack, scales = context.stack, dict(factors or {})
    seen = blocks or [block for block in stack.blocks if block.index not in scales]

    @torch.no_grad()
    def rows_of(number: int, batch: Batch) -> Rows:
        watch = watch_of(batch)
        above = {block.module: pass_through(stack) for block in stack.blocks[seen[-1].index + 1 :]}
        with compensated(stack, scales), override_forward(above), watch.at(seen):
            stack.hidden(batch.input_ids)
        return watch.rows()

    def swept(batches: Mapping[int, Batch], after: Callable[[int], None]) -> Iterator[tuple[int, Rows]]:
        watches = {number: watch_of(batch) for number, batch in batches.items()}
        _sweep(stack, batches, watches, seen, scales, after)
        yield from ((number, watch.rows()) for number, watch in watches.items())

    whole = {**key, "removed": [[block, scale] for block, scale in sorted(scales.items())]}
    return each_batch(context, samples, kind, whole, rows_of, swept=swept)


@torch.no_grad()
def _sweep(
    stack: Stack,
    batches: Mapping[int, Batch],
    watches: Mapping[int, Watch],
    seen: Sequence[Block],
    factors: Mapping[int, float],
    after: Callable[[int], None],
) -> None:
    """Send all batches through the blocks up to the highest that is seen, each brought in once."""
    with Streams() as streams:
        for number, batch in batches.items():
            streams.put(number, embedded(stack, batch.input_ids))
        for block in stack.blocks:
            if block.index <= seen[-1].index:
                with _passing(stack, block, factors) as through:
                    for number, batch in batches.items():
                        stream = streams.take(number, stack.device)
                        with watches[number].at([block] if block in seen else []):
                            streams.put(number, through(batch.input_ids, stream))
            after(block.index)


@contextlib.contextmanager
def _passing(stack: Stack, block: Block, factors: Mapping[int, float]) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """What the stream becomes at a block, as `alone` does; a bypassed one is not brought in."""
    if block.index in factors:
        yield lambda input_ids, stream: factors[block.index] * stream
        return
    with alone(stack, block.index) as through:
        yield through


def compensated(stack: Stack, factors: Mapping[int, float]) -> AbstractContextManager[None]:
    """Context in which blocks are bypassed, and the stream is multiplied by a factor where each was."""

    def through(factor: float) -> Callable[..., Any]:
        return lambda *args, **kwargs: block_output(stack, factor * block_input(args, kwargs))

    return override_forward({stack.blocks[block].module: through(factor) for block, factor in factors.items()})


@contextlib.contextmanager
def block_hooks(blocks: Sequence[Block], record: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which `record(index, x_in, x_out)` sees the residual stream before and after each of `blocks`.

    Hooks rather than `output_hidden_states`: its last entry stands after the final norm, which distorts the last block.
    """

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
