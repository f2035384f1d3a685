"""Measuring A: per-sample gradients of the loss with respect to the gates (paper section 3, before Eq. 6)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
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
        UnfinishedError: other processes (`context.part`) have not done their part.

    """
    stack = context.stack
    alpha = None if positions is None else _gates(stack, samples, positions)
    settings: Facts = {"checkpointing": checkpointing}
    if alpha is not None:
        # The positions themselves, [samples, blocks], would be too long for a key.
        settings["positions"] = hashlib.sha256(alpha.numpy().tobytes()).hexdigest()

    def gradients_of(number: int, batch: Batch) -> Rows:
        here = None if alpha is None else alpha[list(batch.indices)]
        rows, losses = gate_gradients(stack, batch, alpha=here, checkpointing=checkpointing)
        return {"A": rows.cpu().numpy(), "losses": losses.cpu().numpy()}

    # Weight gradients not computed are the whole gain over a plain loop, a factor of 1.4 (log, 2026-11-24, the gradient
    # pass against a loop).
    with frozen(stack):
        rows = each_batch(context, samples, "gradients", settings, gradients_of)
    facts = {
        "model_hash": context.identity,
        "samples": samples.describe(),
        "batch_tokens": context.tokens_per_batch,
        **settings,
    }
    return _joined(stack, samples, rows, facts, positions)


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
    # A column entry sums tokens × width products, far beyond what bfloat16 can add up.
    wide = torch.float64 if stack.model.dtype == torch.float64 else torch.float32
    rows = torch.zeros(len(batch.indices), len(stack.sublayers), dtype=wide, device=batch.input_ids.device)
    # Reentrant checkpointing needs an input that requires a gradient, and the lowest blocks' inputs need none here.
    wrappers = {b.module: partial(checkpoint, b.module.forward, use_reentrant=False) for b in stack.blocks}
    with torch.enable_grad(), _recorded(stack, rows, alpha), override_forward(wrappers if checkpointing else {}):
        losses = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).means
        # Samples do not interact, so one backward pass of the sum holds the gradient of each.
        losses.sum().backward()
    return rows, losses.detach()


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
