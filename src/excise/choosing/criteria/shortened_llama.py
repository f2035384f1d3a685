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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal, by_scores, lowest, ranking
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import ArchitectureError
from excise.measuring.losses import sample_losses
from excise.measuring.measure import measure
from excise.measuring.passes import total
from excise.models.stack import Stack

KEPT_BELOW, KEPT_ABOVE = 4, 2
# Weight gradients take as much memory as the weights: a few blocks at a time, for a pass per group.
BLOCKS_AT_ONCE = 4


def perplexity(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the blocks whose single absence costs least perplexity."""
    measured = measure(context, samples, [(block.index,) for block in context.stack.blocks])
    cost = Cost(measured.forward_tokens)
    return [by_scores("shortened-llama-perplexity", np.exp(measured.losses), brief, context, cost)]


@dataclass(frozen=True)
class Taylor:
    """Criterion that removes the blocks whose weights matter least to first order.

    The sum over batches stands inside the absolute value, so a block's gradients live until its last batch is done.
    Blocks are therefore taken a few at a time, one pass over the samples each, which bounds memory; the backward pass
    ends at the lowest of them.

    Attributes:
        blocks_at_once: blocks whose weight gradients are held together, in float32.

    """

    blocks_at_once: int = BLOCKS_AT_ONCE

    def __call__(self, context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
        """Choose; the first four and the last two blocks go only where nothing else is left.

        Raises:
            ArchitectureError: a block's matrices are not plain floating-point parameters.

        """
        candidates, n = brief.candidates(context.stack), len(context.stack.blocks)
        inner = [i for i in candidates if KEPT_BELOW <= i < n - KEPT_ABOVE]
        ends = [i for i in candidates if i not in inner]
        scored = inner if brief.budget <= len(inner) else candidates
        scores, cost = np.full(n, np.inf), Cost()
        for start in range(0, len(scored), self.blocks_at_once):
            group = scored[start : start + self.blocks_at_once]
            scores[list(group)] = _first_order_weight(context, samples, group)
            # A backward pass ends at the lowest block that wants a gradient.
            below = samples.tokens * (n - group[0]) / n
            cost = Cost(cost.forward_tokens + samples.tokens, cost.backward_tokens + below)
        beyond = max(0, brief.budget - len(inner))
        forced = lowest(scores, beyond, ends)
        order = (*ranking(scores, brief.budget - beyond, inner), *ranking(scores, beyond, ends))
        shown = tuple(float(scores[i]) if i in scored else None for i in range(n))
        note = (
            f"too few blocks between the first {KEPT_BELOW} and the last {KEPT_ABOVE}, which the original keeps: "
            f"of those, {list(forced)} go too"
        )
        removed = tuple(sorted(order))
        return [Proposal("shortened-llama-taylor", removed, shown, order, cost, note=note if forced else "")]


def _first_order_weight(context: Context, samples: Samples, group: Sequence[int]) -> list[float]:
    """Taylor+ score of each block of `group`."""
    stack = context.stack
    matrices = {block: _matrices(stack, block) for block in group}
    flat = [matrix for block in group for matrix in matrices[block]]
    # Gradients of many batches are summed; in bfloat16 the later ones would be rounded away.
    wide = torch.float64 if stack.model.dtype == torch.float64 else torch.float32

    def gradients_of(number: int, batch: Batch) -> Mapping[str, Tensor]:
        return {str(k): g.to(wide) for k, g in enumerate(_gradients(stack, batch, flat))}

    counted = sum(sample.targets for sample in samples)
    with _only_differentiable(stack.model, flat):
        sums = total(context, samples, "weight gradients", gradients_of)
    parts = iter(
        (matrix.detach() * sums[str(k)] / counted).abs().sum(dtype=torch.float64).item()
        for k, matrix in enumerate(flat)
    )
    return [sum(next(parts) for _ in matrices[block]) for block in group]


def _gradients(stack: Stack, batch: Batch, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        loss = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).sums.sum()
        # Weights that no token reached, an idle expert's, have no gradient: zeros, not an error.
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
            # Integers of a quantisation cannot require a gradient at all.
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
