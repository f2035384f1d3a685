"""Measuring A: per-sample gradients of the loss with respect to the gates (paper section 3, before Eq. 6)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.gradients import Gradients
from excise.measuring.losses import sample_losses
from excise.measuring.passes import Rows, each_batch
from excise.measuring.sweep import Streams, alone, embedded, finished
from excise.models.stack import Stack, first, override_forward, replace_first
from excise.plain import Facts, Values

# One odd sample must not cost a long pass; more than a tenth means that weights or dtype are at fault.
MOST_SKIPPED = 0.1


def score(
    context: Context, samples: Samples, *, checkpointing: bool = False, positions: np.ndarray | None = None
) -> Gradients:
    """Measure the gates' gradients on every sample, one gate per sublayer.

    No gate is multiplied: at α = 1 the derivative with respect to a gate is the inner product of its sublayer's output
    with the gradient that arrives there, so the forward stays what it was to the last bit. Weights are frozen: the
    backward pass carries activation gradients only.

    Args:
        context: the model and the store, in which the gradients of finished batches are kept.
        samples: calibration samples.
        checkpointing: recompute each block in the backward pass; memory of one block instead of all, a third more time.
        positions: [samples, blocks], y = 1 − α at which each sample's gradient is taken (see
            `excise.ising.energies.path`); None for the intact model, y = 0. A block's gates share its α.

    Raises:
        InputError: more than a tenth of the samples give a loss or gradient that is not finite.

    """
    stack = context.stack
    alpha = None if positions is None else _gates(stack, samples, positions)
    settings: Facts = {"checkpointing": checkpointing}
    if alpha is not None:
        # The positions themselves, [samples, blocks], would be too long for a key.
        settings["positions"] = hashlib.sha256(alpha.numpy().tobytes()).hexdigest()

    def gates_of(batch: Batch) -> Tensor | None:
        return None if alpha is None else alpha[list(batch.indices)]

    def gradients_of(number: int, batch: Batch) -> Rows:
        return _plain(*gate_gradients(stack, batch, alpha=gates_of(batch), checkpointing=checkpointing))

    def swept(batches: Mapping[int, Batch], after: Callable[[int], None]) -> Iterator[tuple[int, Rows]]:
        for number, rows, losses in swept_gradients(stack, batches, gates_of, after):
            yield number, _plain(rows, losses)

    # Weight gradients not computed are the whole gain over a plain loop, a factor of 1.4 (log, 2026-11-24, the gradient
    # pass against a loop).
    with frozen(stack):
        rows = each_batch(context, samples, "gradients", settings, gradients_of, swept=swept)
    facts = {
        "model_hash": context.identity,
        "samples": samples.describe(),
        "batch_tokens": context.tokens_per_batch,
        **settings,
    }
    return _joined(stack, samples, rows, facts, positions)


def _plain(rows: Tensor, losses: Tensor) -> Rows:
    return {"A": rows.cpu().numpy(), "losses": losses.cpu().numpy()}


def _gates(stack: Stack, samples: Samples, positions: np.ndarray) -> Tensor:
    """Gates α [samples, gates] of positions y [samples, blocks]."""
    if positions.shape != (len(samples), len(stack.blocks)):
        raise InputError(
            f"positions must be [samples, blocks], {len(samples)} × {len(stack.blocks)}; got {list(positions.shape)}"
        )
    return torch.from_numpy(1 - positions)[:, [sublayer.block for sublayer in stack.sublayers]]


def gate_gradients(
    stack: Stack, batch: Batch, *, alpha: Tensor | None = None, checkpointing: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of one batch.

    Args:
        stack: the model, its weights frozen (`requires_grad` False) for speed; the result does not depend on it.
        batch: samples padded on the right.
        alpha: gates [batch, gates] at which the gradients are taken; None for 1, where nothing is multiplied.
        checkpointing: see `score`.

    Returns:
        A rows [batch, gates] and mean token losses [batch], float32 (float64 for a float64 model).

    """
    batch = batch.to(stack.device)
    rows = _no_rows(stack, batch)
    # Reentrant checkpointing needs an input that requires a gradient, and the lowest blocks' inputs need none here.
    wrappers = {b.module: partial(checkpoint, b.module.forward, use_reentrant=False) for b in stack.blocks}
    with torch.enable_grad(), _recorded(stack, rows, alpha), override_forward(wrappers if checkpointing else {}):
        losses = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).means
        # Samples do not interact, so one backward pass of the sum holds the gradient of each.
        losses.sum().backward()
    return rows, losses.detach()


def swept_gradients(
    stack: Stack,
    batches: Mapping[int, Batch],
    gates_of: Callable[[Batch], Tensor | None],
    after: Callable[[int], None],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Gradients of many batches, every block brought in twice: upwards for the streams, downwards for the gradients.

    Args:
        stack: the model, its weights frozen.
        batches: by number, on the model's device.
        gates_of: batch → gates [batch, gates] at which the gradients are taken, or None for 1.
        after: called with the index of each block once all batches are through it in both directions.

    Yields:
        The number of a batch, A rows and losses as `gate_gradients` gives them.

    """
    n, device = len(stack.blocks), stack.device
    rows = {number: _no_rows(stack, batch) for number, batch in batches.items()}
    losses: dict[int, Tensor] = {}
    with Streams() as streams:
        _keep_inputs(stack, batches, streams, gates_of)
        for number, batch in batches.items():
            stream = streams.take((n, number), device).requires_grad_()
            with torch.enable_grad():
                means = sample_losses(stack, finished(stack, batch.input_ids, stream), batch.labels).means
                (gradient,) = torch.autograd.grad(means.sum(), stream)
            losses[number] = means.detach()
            streams.put(("gradient", number), gradient)
        for block in reversed(stack.blocks):
            with alone(stack, block.index) as through:
                for number, batch in batches.items():
                    # Below the lowest sublayer nothing needs a gradient, as in `gate_gradients`.
                    stream = streams.take((block.index, number), device).requires_grad_(block.index > 0)
                    with torch.enable_grad(), _recorded(stack, rows[number], gates_of(batch)):
                        above = through(batch.input_ids, stream)
                    above.backward(streams.take(("gradient", number), device))
                    if stream.grad is not None:
                        streams.put(("gradient", number), stream.grad)
            after(n - 1 - block.index)
    for number in batches:
        yield number, rows[number], losses[number]


@torch.no_grad()
def _keep_inputs(
    stack: Stack, batches: Mapping[int, Batch], streams: Streams, gates_of: Callable[[Batch], Tensor | None]
) -> None:
    """Let the stream before every block wait, under (block, batch), and that after the last."""
    for number, batch in batches.items():
        streams.put((0, number), embedded(stack, batch.input_ids))
    for block in stack.blocks:
        with alone(stack, block.index) as through:
            for number, batch in batches.items():
                alpha = gates_of(batch)
                stream = streams.get((block.index, number), stack.device)
                with contextlib.ExitStack() as multiplied:
                    if alpha is not None:
                        # The hooks that multiply by gates want a graph, here of one block and one batch.
                        multiplied.enter_context(torch.enable_grad())
                        multiplied.enter_context(_recorded(stack, _no_rows(stack, batch), alpha))
                    streams.put((block.index + 1, number), through(batch.input_ids, stream))


def _no_rows(stack: Stack, batch: Batch) -> Tensor:
    # A column entry sums tokens × width products, far beyond what bfloat16 can add up.
    wide = torch.float64 if stack.model.dtype == torch.float64 else torch.float32
    return torch.zeros(len(batch.indices), len(stack.sublayers), dtype=wide, device=stack.device)


@contextlib.contextmanager
def _recorded(stack: Stack, rows: Tensor, alpha: Tensor | None) -> Iterator[None]:
    """Hook every sublayer so that the backward pass writes its column of `rows`."""

    def hook(module: torch.nn.Module, args: object, output: Any, gate: int, share: float) -> Any:
        tensor = first(output)
        if not tensor.requires_grad:
            # The lowest sublayer: nothing below it needs a gradient, so its output is where the graph begins.
            tensor.requires_grad_(True)
        # Detached, since the hook must not hold the graph it hangs in.
        value = tensor.detach()

        def column(gradient: Tensor) -> None:
            product = gradient.to(rows.dtype) * value.to(rows.dtype)
            # Reshaped, since OPT's sublayers return [batch × tokens, width].
            per_sample = product.reshape(len(rows), -1).sum(dim=1)
            rows[:, gate] = share * per_sample.to(rows.device)

        # At α = 1 a product would change nothing, and keep one more activation per sublayer: none is taken.
        if alpha is None:
            tensor.register_hook(column)
            return None
        # A sublayer may carry a share of the block's output only (a scaled stream): gate 0 takes away that share.
        factors = 1 - share * (1 - alpha[:, gate].to(tensor.device, tensor.dtype))
        scaled = (tensor.reshape(len(rows), -1) * factors.unsqueeze(1)).reshape(tensor.shape)
        scaled.register_hook(column)
        return replace_first(output, scaled)

    handles = [s.module.register_forward_hook(partial(hook, gate=s.gate, share=s.share)) for s in stack.sublayers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(stack: Stack) -> Iterator[None]:
    """Context in which no weight requires a gradient."""
    trainable = [p for p in stack.model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _joined(stack: Stack, samples: Samples, rows: Rows, facts: Values, positions: np.ndarray | None) -> Gradients:
    A, losses = rows["A"], rows["losses"]
    finite = np.isfinite(A).all(axis=1) & np.isfinite(losses)
    names = np.array([sample.name for sample in samples], dtype=object)
    skipped = tuple(names[~finite])
    if len(skipped) > MOST_SKIPPED * len(names):
        raise InputError(
            f"{len(skipped)} of {len(names)} samples have a loss or gradient that is not finite "
            f"(first: {', '.join(skipped[:3])}); at most a tenth may. Try --dtype float32, or check the weights"
        )
    return Gradients(
        A[finite],
        losses[finite],
        tuple(s.block for s in stack.sublayers),
        tuple(s.kind for s in stack.sublayers),
        tuple(names[finite]),
        skipped,
        {
            "gates": {
                "parameters": [s.parameters for s in stack.sublayers],
                "bytes": [s.bytes for s in stack.sublayers],
            },
            "blocks": {"parameters": [b.parameters for b in stack.blocks], "bytes": [b.bytes for b in stack.blocks]},
        },
        {**facts, "model": getattr(stack.model.config, "_name_or_path", None)},
        None if positions is None else positions[finite],
    )
