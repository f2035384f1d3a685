"""Block by block over all batches: how a model is passed over whose weights do not fit in memory.

One block's weights are held, the residual streams of all batches (and of all candidates) go through it, and the next
block is brought in. The streams wait in memory, or on disk beyond a limit. The model's own forward still calls the
block, everything else passed through, so that masks, positions and caches of each kind of block stay the model's.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.models.residency import held, is_offloaded
from excise.models.room import STREAMS_SHARE, free_memory
from excise.models.stack import (
    Stack,
    block_input,
    block_output,
    first,
    override_forward,
    pass_through,
    replace_first,
)
from excise.plain import Facts

Through = Callable[[Tensor, Tensor], Tensor]


def sweeps(stack: Stack) -> bool:
    """Whether passes go block by block: some weights wait elsewhere, and every block can be run from a stream alone."""
    # Where blocks need more than the stream, each forward reads them all.
    return not stack.shares_kv and any(is_offloaded(block.module) for block in stack.blocks)


@contextlib.contextmanager
def alone(stack: Stack, index: int) -> Iterator[Through]:
    """Context in which one block's weights are held.

    Yields:
        (token ids [batch, tokens], residual stream before the block [batch, tokens, width]) → the stream after it.

    """
    block, entering = stack.blocks[index].module, [torch.empty(0)]
    # At block 0 too: what the embedding gave is the same, but what asks for gradients wants its own tensor there.
    others = {other.module: pass_through(stack) for other in stack.blocks if other.module is not block}
    kept: list[Tensor] = []

    def enter(module: object, args: tuple[Any, ...], kwargs: Facts) -> tuple[tuple[Any, ...], Facts]:
        if args:
            return (entering[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": entering[0]}

    def leave(module: object, args: object, output: Any) -> Any:
        kept[:] = [first(output)]
        # What follows, the final norm, has no part in it.
        return replace_first(output, kept[0].detach())

    def through(input_ids: Tensor, stream: Tensor) -> Tensor:
        entering[0] = stream
        # Last of all hooks, so that it sees what others make of the output.
        handle = block.register_forward_hook(leave)
        try:
            stack.hidden(input_ids)
        finally:
            handle.remove()
        return kept.pop()

    handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        with held(block), override_forward(others):
            yield through
    finally:
        handle.remove()


def run_blocks(
    stack: Stack,
    input_ids: Int[Tensor, "batch tokens"],
    start: int,
    stop: int,
    stream: Float[Tensor, "batch tokens width"] | None = None,
    removed: Collection[int] = (),
) -> Float[Tensor, "batch tokens width"]:
    """Run blocks `start` to `stop` − 1, without those removed, and then the final norm.

    Args:
        stack: the model.
        input_ids: [batch, tokens], on the stack's device.
        start: first block.
        stop: block to stop before.
        stream: residual stream [batch, tokens, width] before block `start`; not asked for at block 0, where it is the
            embedding's.
        removed: original indices.

    Returns:
        Final hidden states [batch, tokens, width].

    """
    through = pass_through(stack)
    skipped = [b for b in stack.blocks if not start <= b.index < stop or b.index in removed]
    replacements: dict[Any, Callable[..., Any]] = {block.module: through for block in skipped}
    if start > 0 and stream is not None:
        replacements[stack.blocks[start - 1].module] = lambda *_, **__: block_output(stack, stream)
    # The model's own forward still runs, for masks and positions of each kind of block.
    with override_forward(replacements):
        return stack.hidden(input_ids)


def embedded(stack: Stack, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
    """The residual stream before block 0."""
    kept: list[Tensor] = []

    def keep(module: object, args: tuple[Tensor, ...], kwargs: Facts) -> None:
        kept[:] = [block_input(args, kwargs)]

    handle = stack.blocks[0].module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run_blocks(stack, input_ids, 0, 0)
    finally:
        handle.remove()
    return kept[0]


def finished(
    stack: Stack, input_ids: Int[Tensor, "batch tokens"], stream: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens width"]:
    """Final hidden states of a residual stream after the last block."""
    return run_blocks(stack, input_ids, len(stack.blocks), len(stack.blocks), stream)


class Streams:
    """Tensors that wait, in memory up to a limit and on disk beyond it; a context, at whose end the disk is cleared.

    Args:
        limit: bytes of memory; by default a share of what is free.

    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = STREAMS_SHARE * free_memory() if limit is None else limit
        self._kept: dict[Hashable, Tensor] = {}
        self._bytes = 0
        self._written: dict[Hashable, Path] = {}
        self._numbers = 0
        self._place: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        if self._place is not None:
            self._place.cleanup()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Let a tensor wait under a key that is free."""
        # A view would keep all of what it is a view of.
        tensor = tensor.detach().to("cpu").contiguous()
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        if self._bytes + tensor.nbytes <= self._limit:
            self._kept[key] = tensor
            self._bytes += tensor.nbytes
            return
        self._place = self._place or tempfile.TemporaryDirectory(prefix="excise-streams-")
        self._written[key] = Path(self._place.name) / f"{self._numbers}.safetensors"
        self._numbers += 1
        save_file({"stream": tensor}, self._written[key])

    def get(self, key: Hashable, device: torch.device) -> Tensor:
        """What waits under a key."""
        kept = self._kept.get(key)
        return (load_file(self._written[key])["stream"] if kept is None else kept).to(device)

    def take(self, key: Hashable, device: torch.device) -> Tensor:
        """What waits under a key, which is free after."""
        tensor = self.get(key, device)
        if key in self._kept:
            self._bytes -= self._kept.pop(key).nbytes
        else:
            self._written.pop(key).unlink()
        return tensor

    def drop(self, name: Hashable) -> None:
        """Forget all that waits under keys (name, …)."""
        cpu = torch.device("cpu")
        for key in [key for key in (*self._kept, *self._written) if isinstance(key, tuple) and key[0] == name]:
            self.take(key, cpu)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept or key in self._written
