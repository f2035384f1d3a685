"""Shortened LLaMA (Kim et al., 2024, arXiv 2402.02834): perplexity without a block, and Taylor+, both in one shot.

Perplexity: exp of the mean token negative log-likelihood with that one block off; the lowest are removed.
Taylor+: Σ over the block's matrices Σ over weights |Σ over batches w · ∂L/∂w|; the lowest are removed, never one of the
first four or the last two blocks.

Beyond the original: L is the mean over all counted tokens, which scales all Taylor+ scores alike; every parameter of
two or more dimensions counts as a matrix, so that stacked experts do; perplexities share the computation of the blocks
below; and where the ends of a short stack must go for the budget to fit, Taylor+ takes them last, by the same score,
with a note.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from excise.choosing.criteria.selection import Selection, lowest, ranking, removable_blocks
from excise.data.batches import Batch, default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.errors import ArchitectureError
from excise.measuring.losses import sample_losses
from excise.measuring.measure import measure
from excise.models.stack import Stack

KEPT_BELOW, KEPT_ABOVE = 4, 2
BLOCKS_AT_ONCE = 4


def perplexity(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the `budget` blocks whose single absence costs least perplexity.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to remove.
        protected: blocks that stay.
        seed: not used; nothing here is random.
        work: folder in which measurements are kept, so that an interrupted search goes on.
        advance: called with tokens × blocks done.

    """
    candidates = removable_blocks(stack, budget, protected)
    measured = measure(stack, samples, [(block.index,) for block in stack.blocks], ledger=work, advance=advance)
    perplexities = np.exp(measured.losses)
    return Selection(
        "shortened-llama-perplexity",
        lowest(perplexities, budget, candidates),
        tuple(map(float, perplexities)),
        ranking(perplexities, budget, candidates),
        forward_tokens=measured.forward_tokens,
    )


def taylor(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
    blocks_at_once: int = BLOCKS_AT_ONCE,
) -> Selection:
    """Remove the `budget` blocks whose weights matter least to first order.

    The sum over batches stands inside the absolute value, so a block's gradients live until its last batch is done.
    Blocks are therefore taken a few at a time, one pass over the samples each, which bounds memory; the backward pass
    ends at the lowest of them.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to remove.
        protected: blocks that stay, besides the first four and the last two.
        seed: not used; nothing here is random.
        work: not used; weight gradients are not kept.
        advance: called with tokens done, each pass.
        blocks_at_once: blocks whose weight gradients are held together, in float32.

    Raises:
        ArchitectureError: a block's matrices are not plain floating-point parameters.

    """
    candidates = removable_blocks(stack, budget, protected)
    n = len(stack.blocks)
    inner = [i for i in candidates if KEPT_BELOW <= i < n - KEPT_ABOVE]
    ends = [i for i in candidates if i not in inner]
    scored = inner if budget <= len(inner) else candidates
    scores, forward, backward = np.full(n, np.inf), 0.0, 0.0
    for start in range(0, len(scored), blocks_at_once):
        group = scored[start : start + blocks_at_once]
        scores[list(group)] = _first_order_weight(stack, samples, group, advance)
        forward += samples.tokens
        backward += samples.tokens * (n - group[0]) / n
    beyond = max(0, budget - len(inner))
    forced = lowest(scores, beyond, ends)
    order = (*ranking(scores, budget - beyond, inner), *ranking(scores, beyond, ends))
    return Selection(
        "shortened-llama-taylor",
        tuple(sorted(order)),
        tuple(float(scores[i]) if i in scored else None for i in range(n)),
        order,
        forward_tokens=forward,
        backward_tokens=backward,
        note=f"too few blocks between the first {KEPT_BELOW} and the last {KEPT_ABOVE}, which the original keeps: "
        f"of those, {list(forced)} go too"
        if forced
        else "",
    )


def _first_order_weight(
    stack: Stack, samples: Samples, group: Sequence[int], advance: Callable[[int], None] | None
) -> list[float]:
    """Taylor+ score of each block of `group`."""
    matrices = {block: _matrices(stack, block) for block in group}
    flat = [matrix for block in group for matrix in matrices[block]]
    wide = torch.float64 if stack.model.dtype == torch.float64 else torch.float32
    sums = [torch.zeros_like(matrix, dtype=wide) for matrix in flat]
    counted = sum(sample.targets for sample in samples)
    with _only_differentiable(stack.model, flat):
        for batch in make_batches(samples, default_batch_tokens(stack)):
            for total, gradient in zip(sums, _gradients(stack, batch, flat), strict=True):
                total += gradient
            if advance:
                advance(batch.tokens)
    parts = iter(
        (matrix.detach() * total / counted).abs().sum(dtype=torch.float64).item()
        for matrix, total in zip(flat, sums, strict=True)
    )
    return [sum(next(parts) for _ in matrices[block]) for block in group]


def _gradients(stack: Stack, batch: Batch, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    batch = batch.to(stack.device)
    with torch.enable_grad():
        loss = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).sums.sum()
        return torch.autograd.grad(loss, matrices, materialize_grads=True)


def _matrices(stack: Stack, block: int) -> list[nn.Parameter]:
    matrices = [parameter for parameter in stack.blocks[block].module.parameters() if parameter.dim() >= 2]
    if not matrices or not all(p.is_floating_point() and not p.is_meta for p in matrices):
        raise ArchitectureError(
            f"Taylor+ needs the gradients of plain floating-point weights, and those of block {block} are quantised or "
            f"offloaded; load the model dequantised where it fits in memory"
        )
    return matrices


@contextlib.contextmanager
def _only_differentiable(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
