"""Measuring A: per-sample gradients of the loss with respect to the gates (paper section 3, before Eq. 6)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from excise.data.batches import Batch, default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.gradients import Gradients
from excise.measuring.journal import Journal
from excise.measuring.losses import sample_losses
from excise.models.identity import model_identity
from excise.models.stack import Stack, first, override_forward, replace_first

MOST_SKIPPED = 0.1


def score(
    stack: Stack,
    samples: Samples,
    *,
    batch_tokens: int | None = None,
    checkpointing: bool = False,
    journal: Path | None = None,
    part: tuple[int, int] = (0, 1),
    positions: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
) -> Gradients | None:
    """Measure the gates' gradients on every sample, one gate a sublayer.

    No gate is multiplied: at α = 1 the derivative with respect to a gate is the inner product of its sublayer's output
    with the gradient that arrives there, so the forward stays what it was to the last bit. Weights are frozen: the
    backward pass carries activation gradients only.

    Args:
        stack: the model.
        samples: calibration samples.
        batch_tokens: padded tokens a batch; by default what keeps the device busy.
        checkpointing: recompute each block in the backward pass; memory of one block instead of all, a third more time.
        journal: folder that makes the pass resumable (deleted by the caller once the result is kept).
        positions: [samples, blocks], y = 1 − α at which each sample's gradient is taken (see
            `excise.ising.energies.path`); None for the intact model, y = 0. A block's gates share its α.
        part: (rank, parts): do only batches rank, rank + parts, …, for several processes that share a journal.
        advance: called with the number of tokens of each finished batch.

    Returns:
        Gradients, or None while other parts of the journal are missing.

    Raises:
        InputError: more than a tenth of the samples give a loss or gradient that is not finite.

    """
    batch_tokens = batch_tokens or default_batch_tokens(stack)
    rank, parts = part
    if not 0 <= rank < parts:
        raise InputError(f"expected a part (rank, parts) with 0 <= rank < parts, got {part}")
    settings: dict[str, Any] = {"batch_tokens": batch_tokens, "checkpointing": checkpointing}
    alpha = None if positions is None else _gates(stack, samples, positions)
    if alpha is not None:
        settings["positions"] = hashlib.sha256(alpha.numpy().tobytes()).hexdigest()
    facts = {"model_hash": model_identity(stack.model), "samples": samples.describe(), **settings}
    record = Journal(journal, {"stage": "gradients", **facts})
    batches = make_batches(samples, batch_tokens)
    with frozen(stack):
        for number in range(rank, len(batches), parts):
            if number not in record:
                batch = batches[number]
                here = None if alpha is None else alpha[list(batch.indices)]
                rows, losses = gate_gradients(stack, batch, alpha=here, checkpointing=checkpointing)
                record.write(number, A=rows.cpu().numpy(), losses=losses.cpu().numpy())
            if advance:
                advance(batches[number].tokens)
    if any(number not in record for number in range(len(batches))):
        return None
    return _join(stack, samples, batches, record, facts, positions)


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
    wide = torch.float64 if stack.model.dtype == torch.float64 else torch.float32
    rows = torch.zeros(len(batch.indices), len(stack.sublayers), dtype=wide, device=batch.input_ids.device)
    wrappers = {b.module: partial(checkpoint, b.module.forward, use_reentrant=False) for b in stack.blocks}
    with torch.enable_grad(), _recorded(stack, rows, alpha), override_forward(wrappers if checkpointing else {}):
        losses = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).means
        losses.sum().backward()
    return rows, losses.detach()


@contextlib.contextmanager
def _recorded(stack: Stack, rows: Tensor, alpha: Tensor | None) -> Iterator[None]:
    """Hook every sublayer so that the backward pass writes its column of `rows`."""

    def hook(module: torch.nn.Module, args: Any, output: Any, gate: int, share: float) -> Any:
        tensor = first(output)
        if not tensor.requires_grad:
            tensor.requires_grad_(True)  # the lowest sublayer: nothing below it needs a gradient
        value = tensor.detach()  # the hook must not hold the graph it hangs in

        def column(gradient: Tensor) -> None:
            product = gradient.to(rows.dtype) * value.to(rows.dtype)
            per_sample = product.reshape(len(rows), -1).sum(dim=1)  # OPT's are [batch × tokens, width]
            rows[:, gate] = share * per_sample.to(rows.device)

        if alpha is None:
            tensor.register_hook(column)
            return None
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


def _join(
    stack: Stack,
    samples: Samples,
    batches: Sequence[Batch],
    record: Journal,
    facts: Mapping[str, Any],
    positions: np.ndarray | None,
) -> Gradients:
    pieces = [record.read(number) for number in range(len(batches))]
    order = np.argsort([i for batch in batches for i in batch.indices])
    A = np.concatenate([piece["A"] for piece in pieces])[order]
    losses = np.concatenate([piece["losses"] for piece in pieces])[order]
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
