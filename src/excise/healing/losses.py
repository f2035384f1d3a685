"""Distillation losses: KL(teacher ‖ student) over a large vocabulary in chunks, cross-entropy, hidden states.

Neither the teacher's nor the student's [batch, tokens, vocabulary] ever exists. As in `excise.measuring.losses`, the
gradient of each chunk is taken while its logits exist; here it reaches the head's weights as well, so that a step
costs the three matrix products that it needs, and not a fourth for recomputation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from excise.data.batches import IGNORED
from excise.errors import ArchitectureError
from excise.measuring.distributions import top_divergence
from excise.measuring.losses import CHUNK_ELEMENTS, GPU_CHUNKS
from excise.models.stack import Stack


class Targets(Protocol):
    """What the student is to predict at the counted positions of a batch, in the order of `counted_rows`."""

    def divergence(
        self, rows: slice, log_q: Float[Tensor, "rows vocabulary"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
        """KL(p ‖ q) at some positions.

        Args:
            rows: which positions.
            log_q: [rows, vocabulary], log-probabilities of the student at the distillation temperature.

        Returns:
            KL [rows], in nats, and its gradient [rows, vocabulary] with respect to the logits behind `log_q`.

        """
        ...


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """Targets from a teacher in memory.

    Attributes:
        teacher: gives the teacher's vocabulary head.
        hidden: [positions, width], the teacher's final hidden states.
        temperature: by which the teacher's logits are divided.

    """

    teacher: Stack
    hidden: Float[Tensor, "positions width"]
    temperature: float = 1.0

    def divergence(
        self, rows: slice, log_q: Float[Tensor, "rows vocabulary"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
        """KL(p ‖ q) over the whole vocabulary; see `Targets`."""
        with torch.no_grad():
            logits = self.teacher.logits(self.hidden[rows]).to(log_q.device, log_q.dtype)
            log_p = torch.log_softmax(logits / self.temperature, dim=-1)
        p = log_p.exp()
        # In place, and p taken before: each array of [chunk, vocabulary] less lowers the peak.
        return torch.linalg.vecdot(p, log_p.sub_(log_q)), log_q.exp().sub_(p)


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Targets from a teacher's k most probable tokens and the mass of all others.

    The others are one bucket: KL over k + 1 outcomes, a lower bound of the full KL that it reaches at k = vocabulary.
    It equals the full KL from a teacher that shares its remainder out as the student does, which gives the gradient.

    Attributes:
        tokens: [positions, k], token ids.
        log_probs: [positions, k], their log-probabilities at the distillation temperature.
        rest: [positions], probability of all other tokens.

    """

    tokens: Int[Tensor, "positions k"]
    log_probs: Float[Tensor, "positions k"]
    rest: Float[Tensor, " positions"]

    def divergence(
        self, rows: slice, log_q: Float[Tensor, "rows vocabulary"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
        """KL(p ‖ q) over the k tokens and the remainder; see `Targets`."""
        tokens = self.tokens[rows].to(log_q.device, torch.int64)
        log_p, rest = (t[rows].to(log_q.device, log_q.dtype) for t in (self.log_probs, self.rest))
        q = log_q.exp()
        others = q.scatter(1, tokens, 0.0)
        q_rest = others.sum(dim=-1)
        # Where nothing is left of q there is nothing to share out: no division by 0.
        ratio = torch.where(q_rest > 0, rest / q_rest.where(q_rest > 0, 1.0), 0.0)
        target = others.mul_(ratio.unsqueeze(1)).scatter_(1, tokens, log_p.exp())
        return top_divergence(log_p, rest, log_q.gather(1, tokens), q_rest.log()), q.sub_(target)


@dataclass(frozen=True, eq=False)
class VocabularyLoss:
    """Sums over the counted positions of a batch, in nats.

    Attributes:
        total: KL·T² + cross-entropy · its weight; differentiable.
        divergence: KL·T².
        cross_entropy: 0 where it has no weight.
        count: number of positions.

    """

    total: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    count: int


def counted_rows(
    labels: Int[Tensor, "batch tokens"],
) -> tuple[Int[Tensor, " positions"], Int[Tensor, " positions"]]:
    """Rows and positions of the counted positions of a batch, sample by sample."""
    rows, positions = torch.nonzero(labels != IGNORED, as_tuple=True)
    return rows, positions


def vocabulary_loss(
    student: Stack,
    hidden: Float[Tensor, "batch tokens width"],
    labels: Int[Tensor, "batch tokens"],
    targets: Targets,
    *,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
) -> VocabularyLoss:
    """Distillation loss of a batch, differentiable in `hidden` and in the weights of the student's head.

    KL is that of the distributions at temperature T, times T², so that its gradient keeps its size as T changes
    (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531).

    Args:
        student: gives the vocabulary head.
        hidden: [batch, tokens, width], the student's final hidden states.
        labels: [batch, tokens] token that each position must predict, `IGNORED` where none counts.
        targets: of the counted positions.
        temperature: T > 0.
        cross_entropy: weight of the next token's cross-entropy (at temperature 1).

    Raises:
        ArchitectureError: the head is not one matrix.

    """
    head = student.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArchitectureError(
            f"distillation needs a vocabulary head that is one matrix, this model's is a {type(head).__name__}"
        )
    rows, positions = counted_rows(labels)
    device = head.weight.device
    states = hidden[rows.to(hidden.device), positions.to(hidden.device)].to(device)
    total, divergence, hard = _ChunkedDistillation.apply(
        states, head.weight, head.bias, labels[rows, positions].to(device), student, targets, temperature, cross_entropy
    )
    return VocabularyLoss(total, divergence, hard, len(rows))


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        student: Stack,
        targets: Targets,
        temperature: float,
        cross_entropy: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.zeros(
            2, dtype=torch.float64 if states.dtype == torch.float64 else torch.float32, device=states.device
        )
        gradients = _Gradients.like(states, weight, bias, ctx.needs_input_grad)
        chunk = max(1, CHUNK_ELEMENTS * (1 if states.device.type == "cpu" else GPU_CHUNKS) // len(weight))
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            raw, logits = _logits(student, states[rows])
            divergence, hard, slope = _losses(logits.detach(), labels[rows], targets, rows, temperature, cross_entropy)
            sums += torch.stack([divergence.sum(), hard.sum()]).to(sums.dtype)
            if any(ctx.needs_input_grad):
                (slope,) = torch.autograd.grad(logits, raw, slope.to(logits.dtype))
                gradients.add(rows, slope, states[rows], weight)
        ctx.gradients = gradients
        divergence_sum, hard_sum = sums.unbind()
        total = divergence_sum + cross_entropy * hard_sum
        # For reports only; the gradient is that of the total.
        ctx.mark_non_differentiable(divergence_sum, hard_sum)
        return total, divergence_sum, hard_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place below, so there is one backward pass; a second must not find them.
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.times(grad_total), None, None, None, None, None)


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients with respect to states, weight and bias, None where none is wanted, and the dtypes they end in."""

    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtypes: tuple[torch.dtype, torch.dtype]

    @staticmethod
    def like(states: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> _Gradients:
        # Many chunks are summed, hence float32 even for a bfloat16 head.
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return _Gradients(
            torch.empty_like(states) if wanted[0] else None,
            torch.zeros_like(weight, dtype=wide) if wanted[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None,
            (states.dtype, weight.dtype),
        )

    def add(self, rows: slice, slope: Tensor, states: Tensor, weight: Tensor) -> None:
        # The trainer's autocast would take these products in bfloat16, and round what the chunks add up to.
        with torch.autocast(slope.device.type, enabled=False):
            if self.states is not None:
                self.states[rows] = (slope.to(weight.dtype) @ weight).to(self.dtypes[0])
            if self.weight is not None:
                self.weight.addmm_(slope.T.to(self.weight.dtype), states.to(self.weight.dtype))
            if self.bias is not None:
                self.bias.add_(slope.sum(dim=0))

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = self.dtypes
        return tuple(
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in ((self.states, states), (self.weight, weight), (self.bias, weight))
        )  # type: ignore[return-value]


def _logits(student: Stack, states: Tensor) -> tuple[Tensor, Tensor]:
    """What the head's matrix gives, and the logits it becomes (scaled, capped), with the graph between the two."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        # The head's product is differentiated by hand in `_Gradients.add`: autograd sees only what follows it.
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = student.model.get_output_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = student.logits(states)
    finally:
        handle.remove()
    return kept[0], logits


def _losses(
    logits: Tensor, labels: Tensor, targets: Targets, rows: slice, temperature: float, cross_entropy: float
) -> tuple[Tensor, Tensor, Tensor]:
    """KL·T² [rows], cross-entropy [rows] and the gradient of their weighted sum with respect to the logits."""
    log_q = torch.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
    divergence, slope = targets.divergence(rows, log_q)
    # T² · (q − p) / T: with the square, gradients keep their size whatever T is.
    divergence, slope = divergence * temperature**2, slope.mul_(temperature)
    if cross_entropy == 0:
        return divergence, torch.zeros_like(divergence), slope
    if temperature != 1:
        log_q = torch.log_softmax(logits, dim=-1)
    hard = -log_q.gather(1, labels.unsqueeze(1)).squeeze(1)
    slope.add_(log_q.exp(), alpha=cross_entropy)
    slope.scatter_add_(1, labels.unsqueeze(1), torch.full_like(hard, -cross_entropy).unsqueeze(1))
    return divergence, hard, slope


def hidden_loss(
    student: Mapping[int, Float[Tensor, "batch tokens width"]],
    teacher: Mapping[int, Float[Tensor, "batch tokens width"]],
    real: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Squared distance of residual streams, relative to the teacher's, summed over real tokens, mean over blocks.

    Args:
        student: streams [batch, tokens, width] at some places.
        teacher: those of the teacher at the same places.
        real: [batch, tokens], False at padding.

    """
    terms = []
    for place, stream in student.items():
        goal = teacher[place].to(stream.device).float()
        # Relative to the teacher's stream, whose length grows from block to block; padding may hold zeros.
        distance = (stream.float() - goal).square().sum(dim=-1) / goal.square().sum(dim=-1).clamp(min=1e-30)
        terms.append(distance[real.to(stream.device)].sum().to(real.device))
    return torch.stack(terms).mean()
