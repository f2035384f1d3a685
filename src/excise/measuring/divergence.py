"""How far a pruned model's next-token distributions are from the intact model's, over a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from excise.data.batches import IGNORED
from excise.measuring.losses import CHUNK_ELEMENTS
from excise.models.stack import Stack

# Intact probabilities kept from candidate to candidate (128 MiB of float32), so that the head's product for the intact
# model is paid once per batch and not once per candidate.
KEPT_ELEMENTS = 1 << 25

# (the intact model's probabilities p [tokens, vocabulary], Σ p log p [tokens], the pruned model's logits
# [tokens, vocabulary]) → [tokens].
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl(p: Tensor, negative_entropy: Tensor, logits: Tensor) -> Tensor:
    """KL(intact ‖ pruned) of each token, nats."""
    expected = torch.einsum("tv,tv->t", p, logits)
    # Written with logsumexp, the pruned model's log-probabilities need no [tokens, vocabulary] of their own.
    return negative_entropy - expected + torch.logsumexp(logits, dim=-1)


def rejection(p: Tensor, negative_entropy: Tensor, logits: Tensor) -> Tensor:
    """Total variation distance of each token: the probability that speculative sampling rejects the pruned model's.

    A token drawn from q is kept with probability min(1, p / q), hence Σ min(p, q) of all (Leviathan et al., 2023,
    theorem 3.5). `negative_entropy` has no part in it.
    """
    q = torch.softmax(logits, dim=-1)
    # What p has more than q sums to 1 − Σ min(p, q), and to exactly 0 where both agree.
    return torch.sub(p, q, out=q).clamp_(min=0).sum(dim=-1)


DISTANCES: dict[str, Distance] = {"divergence": kl, "rejection": rejection}


class Divergence:
    """Distance of the pruned model from the intact one on a batch, a function of the former's final hidden states.

    The intact model runs once. Positions go through the vocabulary head in chunks; what belongs to the intact model is
    kept from call to call where it is small, and computed anew, chunk by chunk, where it is not, so that
    [batch, tokens, vocabulary] never exists for a large batch.

    Args:
        stack: the model, intact while this is created.
        input_ids: [batch, tokens].
        labels: [batch, tokens], `IGNORED` where a position does not count.
        intact: [positions, width], the attribute `intact` of an earlier one for the same batch; None runs the model.
        hidden: final hidden states of the intact model, instead of running it.
        distance: of two distributions over the next token.
        keep: most elements of the intact model's probabilities that are kept.

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
        distance: Distance = kl,
        keep: int = KEPT_ELEMENTS,
    ) -> None:
        self._stack, self._samples, self._distance = stack, labels.shape[0], distance
        self._device = stack.model.get_output_embeddings().weight.device
        # Only counted positions go through the head: with padding and template tokens left out, that is much less.
        self._rows, self._positions = torch.nonzero(labels != IGNORED, as_tuple=True)
        if intact is None:
            intact = self._counted(stack.hidden(input_ids) if hidden is None else hidden)
        self.intact = intact
        vocabulary = stack.model.config.get_text_config().vocab_size
        self._chunk = max(1, CHUNK_ELEMENTS // vocabulary)
        self._kept = list(self._intact_chunks()) if len(self._rows) * vocabulary <= keep else None

    @torch.no_grad()
    def __call__(self, hidden: Float[Tensor, "batch tokens width"]) -> Float64[Tensor, " batch"]:
        """Sums over the counted positions of each sample [batch], nats or, of rejections, tokens.

        Args:
            hidden: [batch, tokens, width], final hidden states of the pruned model.

        """
        states = self._counted(hidden)
        # The terms of a divergence cancel where both models agree, so what is left is summed in float64.
        sums = torch.zeros(self._samples, dtype=torch.float64, device=self._device)
        for start, p, negative_entropy in self._kept or self._intact_chunks():
            logits = self._stack.logits(states[start : start + self._chunk])
            distances = self._distance(p, negative_entropy, logits)
            sums.index_add_(0, self._rows[start : start + self._chunk].to(self._device), distances.double())
        return sums

    def _counted(self, hidden: Tensor) -> Tensor:
        """States [positions, width] that predict a counted token."""
        return hidden[self._rows.to(hidden.device), self._positions.to(hidden.device)].to(self._device)

    def _intact_chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Start of each chunk, the intact model's probabilities [chunk, vocabulary] and Σ p log p [chunk]."""
        for start in range(0, len(self.intact), self._chunk):
            log_p = torch.log_softmax(self._stack.logits(self.intact[start : start + self._chunk]), dim=-1)
            p = log_p.exp()
            yield start, p, torch.einsum("tv,tv->t", p, log_p)
