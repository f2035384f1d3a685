"""What a candidate is judged by on a batch: its losses, or how far its distributions are from the intact model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from excise.context import Context
from excise.data.batches import IGNORED, Batch
from excise.measuring.distributions import TOP_K, Distributions, Top, Whole
from excise.measuring.losses import positions_at_once, sample_losses, sums_by_row
from excise.models.stack import Stack
from excise.plain import Facts

# Of a probability that is kept: float32.
ITEM = 4


class Evaluation(Protocol):
    """A function of a candidate's final hidden states on one batch."""

    @property
    def rest(self) -> Float64[Tensor, " batch"]:
        """The intact model's probability of tokens that are not told apart [batch], summed over counted positions."""
        ...

    def __call__(self, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, " batch"]:
        """Sums over the counted positions of each sample [batch], nats or, of rejections, tokens."""
        ...


@dataclass(frozen=True, eq=False)
class Losses:
    """Cross-entropy of the next token; see `Evaluation`.

    Attributes:
        stack: gives the vocabulary head.
        labels: [batch, tokens], `IGNORED` where a position does not count.

    """

    stack: Stack
    labels: Int[Tensor, "batch tokens"]

    @property
    def rest(self) -> Float64[Tensor, " batch"]:
        """All 0: no distribution of the intact model is looked at."""
        return torch.zeros(len(self.labels), dtype=torch.float64)

    def __call__(self, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, " batch"]:
        """See `Evaluation`."""
        return sample_losses(self.stack, hidden, self.labels).sums


# (the intact model's distributions, some of their positions, the pruned model's logits there) → [positions].
Distance = Callable[[Distributions, slice, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {
    "divergence": lambda kept, rows, logits: kept.divergence(rows, logits),
    "rejection": lambda kept, rows, logits: kept.rejection(rows, logits),
}


class Divergence:
    """Distance of the pruned model from the intact one on a batch, a function of the former's final hidden states.

    The intact model runs once, and its distributions are kept; a call costs one application of the vocabulary head.
    Positions go through it in chunks, so that the logits [batch, tokens, vocabulary] of a large batch never exist.

    Args:
        stack: the model, intact while this is created.
        input_ids: [batch, tokens].
        labels: [batch, tokens], `IGNORED` where a position does not count.
        intact: [positions, width], the attribute `intact` of an earlier one for the same batch; None runs the model.
        hidden: final hidden states of the intact model, instead of running it.
        distance: of two distributions over the next token, one of `DISTANCES`.
        top_k: tokens told apart at each position, see `told_apart`; None for all.

    Attributes:
        intact: [positions, width], the intact model's final hidden states that predict a counted token.

    """

    @torch.no_grad()
    def __init__(
        self,
        stack: Stack,
        input_ids: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch tokens"],
        intact: Float[Tensor, "positions width"] | None = None,
        *,
        hidden: Float[Tensor, "batch tokens width"] | None = None,
        distance: str = "divergence",
        top_k: int | None = None,
    ) -> None:
        self._stack, self._samples, self._distance = stack, labels.shape[0], DISTANCES[distance]
        self._device = stack.model.get_output_embeddings().weight.device
        # Only counted positions go through the head: with padding and template tokens left out, that is much less.
        self._rows, self._positions = torch.nonzero(labels != IGNORED, as_tuple=True)
        if intact is None:
            intact = self._counted(stack.hidden(input_ids) if hidden is None else hidden)
        self.intact = intact
        self._kept: Distributions = Whole.of(stack, intact) if top_k is None else Top.of(stack, intact, top_k)

    @property
    def rest(self) -> Float64[Tensor, " batch"]:
        """See `Evaluation`."""
        return self._by_sample(slice(None), self._kept.rest)

    @torch.no_grad()
    def __call__(self, hidden: Float[Tensor, "batch tokens width"]) -> Float64[Tensor, " batch"]:
        """See `Evaluation`."""
        states, chunk = self._counted(hidden), positions_at_once(self._stack)
        sums = torch.zeros(self._samples, dtype=torch.float64, device=self._device)
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            sums += self._by_sample(rows, self._distance(self._kept, rows, self._stack.logits(states[rows])))
        return sums

    def _counted(self, hidden: Tensor) -> Tensor:
        """States [positions, width] that predict a counted token."""
        return hidden[self._rows.to(hidden.device), self._positions.to(hidden.device)].to(self._device)

    def _by_sample(self, rows: slice, values: Tensor) -> Tensor:
        """Sums [batch] of values at some positions."""
        # The terms of a divergence cancel where both models agree, so what is left is summed in float64.
        return sums_by_row(values.double(), self._rows[rows], self._samples)


def counted_positions(batch: Batch) -> int:
    """How many positions of a batch predict a counted token."""
    return int((batch.labels != IGNORED).sum())


def told_apart(context: Context, batches: Iterable[Batch]) -> int | None:
    """How many tokens are told apart in the intact model's distributions at the counted positions of some batches.

    Args:
        context: whose `distribution_room` all their probabilities must not exceed.
        batches: those whose distributions are held at once.

    Returns:
        None for all tokens of the vocabulary; else `TOP_K`, all others being one.

    """
    vocabulary = context.stack.model.config.get_text_config().vocab_size
    whole = ITEM * vocabulary * sum(map(counted_positions, batches))
    return None if whole <= context.distribution_room or vocabulary <= TOP_K else TOP_K


def distribution_facts(top_k: int | None, rest: float, positions: float) -> Facts:
    """What is told of the distributions that divergences were measured from.

    Args:
        top_k: see `told_apart`.
        rest: probability of tokens not told apart, summed over positions.
        positions: how many.

    Returns:
        `top_k` and `kept_mass`, the mean probability of the tokens told apart.

    """
    return {"top_k": top_k, "kept_mass": 1 - rest / max(positions, 1)}
