"""Next-token distributions of a model at some positions, kept: whole, or the most probable tokens and the rest as one.

What is kept costs one application of the vocabulary head; whatever is compared with it later costs its own alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from excise.measuring.losses import positions_at_once
from excise.models.stack import Stack

# Told apart where not all tokens are: 8 kB a position instead of the megabyte of 262,144 tokens.
TOP_K = 1024


class Distributions(Protocol):
    """Distributions p at positions, in some order."""

    @property
    def rest(self) -> Float[Tensor, " positions"]:
        """Probability of the tokens that are not told apart."""
        ...

    def divergence(self, rows: slice, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """KL(p ‖ q) [rows] at some positions, in nats, with `logits` those of q; they may be overwritten."""
        ...

    def rejection(self, rows: slice, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """Total variation distance [rows] likewise: the probability that speculative sampling rejects a draft's token.

        A token drawn from q is kept with probability min(1, p / q), hence Σ min(p, q) of all (Leviathan et al., 2023,
        theorem 3.5).
        """
        ...


@dataclass(frozen=True, eq=False)
class Whole:
    """Distributions over all tokens.

    Attributes:
        p: [positions, vocabulary], probabilities.
        negative_entropy: [positions], Σ p log p, nats.

    """

    p: Float[Tensor, "positions vocabulary"]
    negative_entropy: Float[Tensor, " positions"]

    @staticmethod
    @torch.no_grad()
    def of(stack: Stack, hidden: Float[Tensor, "positions width"]) -> Whole:
        """Those that follow final hidden states, on the device of the vocabulary head."""
        chunk = positions_at_once(stack)
        size = (len(hidden), stack.model.config.get_text_config().vocab_size)
        dtype = stack.logits(hidden[:0]).dtype
        p, negative_entropy = hidden.new_empty(size, dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_p = torch.log_softmax(stack.logits(hidden[rows]), dim=-1)
            torch.exp(log_p, out=p[rows])
            negative_entropy[rows] = torch.linalg.vecdot(p[rows], log_p)
        return Whole(p, negative_entropy)

    @property
    def rest(self) -> Float[Tensor, " positions"]:
        """All 0; see `Distributions`."""
        return torch.zeros_like(self.negative_entropy)

    @torch.no_grad()
    def divergence(self, rows: slice, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """KL(p ‖ q); see `Distributions`."""
        expected = torch.linalg.vecdot(self.p[rows], logits)
        # Written with logsumexp, log-probabilities of q need no [rows, vocabulary] of their own.
        return self.negative_entropy[rows] - expected + torch.logsumexp(logits, dim=-1)

    @torch.no_grad()
    def rejection(self, rows: slice, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """1 − Σ min(p, q); see `Distributions`."""
        q = torch.softmax(logits, dim=-1)
        # What p has more than q sums to 1 − Σ min(p, q), and to exactly 0 where both agree.
        return torch.sub(self.p[rows], q, out=q).clamp_(min=0).sum(dim=-1)


@dataclass(frozen=True, eq=False)
class Top:
    """The k most probable tokens, and the probability of all others together.

    Attributes:
        tokens: [positions, k], token ids; every vocabulary fits 32 bits.
        log_probs: [positions, k], their log-probabilities.
        rest: [positions], probability of all other tokens.

    """

    tokens: Int[Tensor, "positions k"]
    log_probs: Float[Tensor, "positions k"]
    rest: Float[Tensor, " positions"]

    @staticmethod
    @torch.no_grad()
    def of(stack: Stack, hidden: Float[Tensor, "positions width"], k: int, temperature: float = 1.0) -> Top:
        """Those that follow final hidden states, on the device of the vocabulary head.

        Args:
            stack: gives the head.
            hidden: [positions, width], on any device.
            k: tokens told apart at each position.
            temperature: by which the logits are divided.

        """
        hidden = hidden.to(stack.model.get_output_embeddings().weight.device)
        chunk = positions_at_once(stack)
        pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        # Once without any position too, for tensors of the right form.
        for start in range(0, max(1, len(hidden)), chunk):
            log_p = torch.log_softmax(stack.logits(hidden[start : start + chunk]) / temperature, dim=-1)
            values, tokens = log_p.topk(k)
            # Summed, not 1 − kept: small masses survive.
            rest = log_p.exp().scatter_(1, tokens, 0.0).sum(dim=-1)
            pieces.append((tokens.int(), values, rest))
        return Top(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    @torch.no_grad()
    def divergence(self, rows: slice, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """KL(p ‖ q) over k + 1 outcomes; see `Distributions`."""
        return top_divergence(self.log_probs[rows], self.rest[rows], *self._other(rows, logits))

    @torch.no_grad()
    def rejection(self, rows: slice, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """1 − Σ min(p, q) over k + 1 outcomes, a lower bound of that over all tokens; see `Distributions`."""
        log_q, log_q_rest = self._other(rows, logits)
        more = (self.log_probs[rows].exp() - log_q.exp()).clamp_(min=0).sum(dim=-1)
        return more + (self.rest[rows] - log_q_rest.exp()).clamp_(min=0)

    def _other(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the k tokens [rows, k] and of all others together [rows] under q."""
        tokens = self.tokens[rows].to(torch.int64)
        of_top = logits.gather(1, tokens)
        # The others' own logsumexp, not the logarithm of 1 − kept: small masses survive.
        of_rest = torch.logsumexp(logits.scatter_(1, tokens, -torch.inf), dim=-1)
        total = torch.logaddexp(torch.logsumexp(of_top, dim=-1), of_rest)
        return of_top - total.unsqueeze(1), of_rest - total


def top_divergence(
    log_p: Float[Tensor, "rows k"],
    rest: Float[Tensor, " rows"],
    log_q: Float[Tensor, "rows k"],
    log_q_rest: Float[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """KL(p ‖ q) [rows] over k tokens and all others as one outcome, nats: a lower bound of that over all tokens.

    Args:
        log_p: of the k tokens under p.
        rest: probability of the others under p.
        log_q: of the k tokens under q.
        log_q_rest: log-probability of the others under q.

    """
    # Without others, or with none that float32 tells from 0, finite numbers stand where logarithms are not.
    least = torch.finfo(rest.dtype).tiny
    of_rest = rest * (rest.clamp(min=least).log() - log_q_rest.clamp(min=math.log(least)))
    # A token that a model rules out is −∞ on both sides.
    of_top = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    return of_top.sum(dim=-1) + of_rest
