"""Cross-entropy over a large vocabulary, a few tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from excise.data.batches import IGNORED
from excise.models.stack import Stack

# Logits held at a time: 16 MiB of float32. Larger pieces come from the system as new pages each time; 64 MiB was 3–5 %
# slower on a CPU (log, 2026-11-24, the gradient pass against a loop).
CHUNK_ELEMENTS = 1 << 22
# Times as many on a GPU, where launches cost more than memory.
GPU_CHUNKS = 16


@dataclass(frozen=True)
class SampleLosses:
    """Negative log-likelihoods of a batch.

    Attributes:
        sums: [batch], nats summed over the counted tokens of each sample.
        counts: [batch], number of counted tokens.

    """

    sums: Float[Tensor, " batch"]
    counts: Int[Tensor, " batch"]

    @property
    def means(self) -> Float[Tensor, " batch"]:
        """Mean token cross-entropy of each sample [batch], in nats per token."""
        return self.sums / self.counts.clamp(min=1)


def positions_at_once(stack: Stack) -> int:
    """How many positions go through the vocabulary head together."""
    on_cpu = stack.model.get_output_embeddings().weight.device.type == "cpu"
    elements = CHUNK_ELEMENTS * (1 if on_cpu else GPU_CHUNKS)
    return max(1, elements // stack.model.config.get_text_config().vocab_size)


def sample_losses(
    stack: Stack, hidden: Float[Tensor, "batch tokens width"], labels: Int[Tensor, "batch tokens"]
) -> SampleLosses:
    """Cross-entropy per sample from final hidden states, differentiable in `hidden`.

    The tensor [batch, tokens, vocabulary] never exists: counted tokens go through the head in chunks, and where a
    gradient is wanted, the gradient of each chunk is taken while its logits are there (two matrix products a chunk
    instead of the three of recomputation).

    Args:
        stack: gives the vocabulary head.
        hidden: [batch, tokens, width], after the final norm.
        labels: [batch, tokens] token that each position must predict, `IGNORED` where it does not count.

    Returns:
        Sums and counts per sample, float32 (float64 for a float64 model).

    """
    sums = _ChunkedCrossEntropy.apply(hidden, labels, stack)
    return SampleLosses(sums, (labels != IGNORED).sum(dim=1))


def sums_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sums [count] of values that belong to rows, each added up in its order.

    On a GPU, adding by index would add in any order, and no two runs would find the same.

    Args:
        values: [values].
        rows: [values] row of each, ascending.
        count: of rows; one without values has the sum 0.

    """
    lengths = torch.bincount(rows, minlength=count).to(values.device)
    return torch.segment_reduce(values, "sum", lengths=lengths)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, labels: Tensor, stack: Stack) -> Tensor:
        head_device = stack.model.get_output_embeddings().weight.device
        rows, positions = torch.nonzero(labels != IGNORED, as_tuple=True)
        targets = labels[rows, positions].to(head_device)
        wants_gradient = hidden.requires_grad
        states = hidden.detach()[rows.to(hidden.device), positions.to(hidden.device)].to(head_device)
        gradient = torch.empty_like(states) if wants_gradient else None
        chunk = positions_at_once(stack)
        losses = []
        for start in range(0, len(targets), chunk):
            piece, target = states[start : start + chunk], targets[start : start + chunk]
            # Autograd is off inside a Function's forward; the graph built here is that of one chunk and dies with it.
            with torch.set_grad_enabled(wants_gradient):
                piece = piece.requires_grad_(wants_gradient)
                loss = torch.nn.functional.cross_entropy(stack.logits(piece), target, reduction="none")
                if gradient is not None:
                    (gradient[start : start + chunk],) = torch.autograd.grad(loss.sum(), piece)
            losses.append(loss.detach())
        # Thousands of tokens are summed: in bfloat16 a sum would stop growing after some hundred of them.
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        terms = torch.cat(losses).to(dtype) if losses else states.new_zeros(0, dtype=dtype)
        sums = sums_by_row(terms, rows, labels.shape[0])
        if gradient is not None:
            ctx.save_for_backward(rows.to(hidden.device), positions.to(hidden.device), gradient.to(hidden.device))
            ctx.shape = hidden.shape  # type: ignore[attr-defined]
        return sums

    @staticmethod
    # The gradient is stored, not a graph: differentiating twice must fail and not leave out a term.
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        rows, positions, gradient = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_hidden = gradient.new_zeros(ctx.shape)  # type: ignore[attr-defined]
        grad_hidden[rows, positions] = gradient * grad_sums.to(gradient.device, gradient.dtype)[rows].unsqueeze(-1)
        return grad_hidden, None, None
