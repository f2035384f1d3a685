"""Residual streams of original and student at the cuts, batch by batch, kept on disk between the passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.data.batches import Batch
from excise.measuring.losses import sample_losses
from excise.measuring.score import frozen
from excise.measuring.sweep import run_blocks
from excise.models.residency import replaced, waits
from excise.models.stack import (
    Stack,
    block_input,
    first,
    override_forward,
    pass_through,
    replace_first,
)
from excise.plain import Facts
from excise.repair.folds import Fold, Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Uniform is the default: weighting by gradient or norm did not pay (log, 2026-11-24, closed-form repair).
WEIGHTINGS = ("gradient", "norm", "uniform")


def original_streams(
    stack: Stack, batch: Batch, tops: Sequence[int], weighting: str
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The original's residual stream after some blocks, and what an error there weighs at each token.

    Args:
        stack: the original.
        batch: on the stack's device.
        tops: block indices, ascending.
        weighting: "uniform" gives every token 1; "norm" gives 1/‖stream‖², since blocks read the stream through a
            norm; "gradient" gives ‖g‖², with g the gradient of the batch's summed loss with respect to the stream at
            that token: an error δ there moves the loss by g·δ.

    Returns:
        Streams [batch, tokens, width] and weights [batch, tokens] by block.

    """
    streams: dict[int, Tensor] = {}
    with_gradient = weighting == "gradient"

    def keep(index: int) -> Callable[..., Any]:
        def hook(module: object, args: object, output: Any) -> Any:
            stream = first(output)
            if not (with_gradient and index == tops[0]):
                streams[index] = stream
                return None
            # The graph starts here: nothing below needs a gradient.
            streams[index] = stream.detach().requires_grad_()
            return replace_first(output, streams[index])

        return hook

    # Without gradients nobody looks at what comes after the highest cut, so it is not computed.
    above = {block.module: pass_through(stack) for block in stack.blocks[tops[-1] + 1 :]}
    handles = [stack.blocks[index].module.register_forward_hook(keep(index)) for index in tops]
    try:
        with frozen(stack), torch.set_grad_enabled(with_gradient), override_forward({} if with_gradient else above):
            hidden = stack.hidden(batch.input_ids)
            if with_gradient:
                loss = sample_losses(stack, hidden, batch.labels).sums.sum()
                gradients = torch.autograd.grad(loss, [streams[index] for index in tops])
    finally:
        for handle in handles:
            handle.remove()
    streams = {index: stream.detach() for index, stream in streams.items()}
    if with_gradient:
        return streams, {i: wide(g).square().sum(dim=-1) for i, g in zip(tops, gradients, strict=True)}
    return streams, {index: weights_of(stream, weighting) for index, stream in streams.items()}


def weights_of(stream: Tensor, weighting: str) -> Tensor:
    """What an error at each token of a stream [batch, tokens, width] weighs, where no gradient is asked."""
    if weighting == "norm":
        return 1 / wide(stream).square().sum(dim=-1).clamp(min=1e-30)
    return torch.ones(stream.shape[:2], device=stream.device)


def wide(tensor: Tensor) -> Tensor:
    """In the precision in which sums are taken: float32, or float64 for a float64 model."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def student_streams(
    stack: Stack, batch: Batch, start: int, state: Tensor | None, removed: Sequence[int], fold: Fold
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Run the student from one of its saved states up to the block that a fold belongs to.

    Args:
        stack: the model, with whatever repairs it has so far.
        batch: on the stack's device.
        start: block at which the state enters.
        state: residual stream [batch, tokens, width] before block `start`; None where it starts at the embedding.
        removed: original indices.
        fold: of the block to stop after.

    Returns:
        The stream before the block; what `recorded_at` the fold; the stream after the block.

    """
    block = stack.blocks[fold.sublayer.block]
    kept: dict[str, Tensor] = {}

    def before(module: object, args: tuple[Tensor, ...], kwargs: Facts) -> None:
        kept["state"] = block_input(args, kwargs)

    def after(module: object, args: object, output: object) -> None:
        kept["stream"] = first(output)

    handles = [
        block.module.register_forward_pre_hook(before, with_kwargs=True),
        block.module.register_forward_hook(after),
    ]
    try:
        with torch.no_grad(), recorded_at(fold) as found:
            run_blocks(stack, batch.input_ids, start, block.index + 1, state, removed)
    finally:
        for handle in handles:
            handle.remove()
    return kept["state"], found, kept["stream"]


@contextlib.contextmanager
def recorded_at(fold: Fold | None) -> Iterator[dict[str, Tensor]]:
    """Context in which a pass leaves what a fold is fitted on, for `as_features`.

    That is the "input" of its module, where it is a tensor, its scaled "output", and the logits of its "gate", if any.
    """
    found: dict[str, Tensor] = {}
    if fold is None:
        yield found
        return

    def keep(module: object, args: tuple[Tensor, ...], output: Any) -> None:
        if args:
            found["input"] = args[0]
        found["output"] = first(output) * fold.scale

    def keep_gate(module: object, args: object, output: Tensor) -> None:
        found["gate"] = output

    with contextlib.ExitStack() as hooks:
        hooks.callback(fold.module.register_forward_hook(keep).remove)
        if isinstance(fold, Projection) and fold.gate is not None:
            hooks.callback(fold.gate.register_forward_hook(keep_gate).remove)
        yield found


@contextlib.contextmanager
def swapped(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which parameters, by name, hold other data; their own come back at the end."""
    # Those that wait on disk are brought in as others; those that are here, held for a while or for good, change now.
    offloaded = {name: tensor for name, tensor in weights.items() if waits(model, name)}
    here = [(name, p) for name in weights if not (p := model.get_parameter(name)).is_meta]
    originals = [(parameter, parameter.data) for _, parameter in here]
    try:
        for name, parameter in here:
            # Through .data: the parameter keeps its identity, by which tied weights and hooks know it.
            parameter.data = weights[name].to(parameter.device, parameter.dtype)
        with replaced(model, offloaded):
            yield
    finally:
        for parameter, data in originals:
            parameter.data = data


@contextlib.contextmanager
def recorded_streams(stack: Stack, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Context in which a forward pass fills a dictionary: block index → residual stream after that block."""
    streams: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        return lambda module, args, output: streams.__setitem__(index, first(output))

    handles = [stack.blocks[index].module.register_forward_hook(keep(index)) for index in blocks]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


class Scratch:
    """Tensors of each batch on disk between passes, so that memory holds one batch at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, number: int, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep (or replace) one kind of tensors of a batch."""
        # safetensors refuses tensors that are not contiguous.
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, self.folder / f"{kind}-{number:06d}.safetensors")

    def read(self, number: int, kind: str) -> dict[str, Tensor]:
        """Tensors of a batch as they were written; none if they were not."""
        path = self.folder / f"{kind}-{number:06d}.safetensors"
        return load_file(path) if path.exists() else {}
