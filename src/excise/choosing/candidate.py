"""Candidates beside their measured damage; light, so that whoever only reads results need not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from excise.artefacts import Artefact


@dataclass(frozen=True)
class Candidate:
    """A removal and what is known of it.

    Attributes:
        method: who proposed it; `fisher:3` is the third excited state of the paper's energy (its CBO:3).
        removed: sorted original indices.
        energy: under the energy of the run, in that energy's unit.
        loss: measured on the held-out samples, nats per token.
        delta: loss less that of the intact model.
        perplexity: exp(loss).
        parameters: of the pruned model.
        repaired_loss: loss after closed-form repair; None where it was not repaired.
        domains: `delta` in each category of the samples.

    """

    method: str
    removed: tuple[int, ...]
    energy: float
    loss: float
    delta: float
    perplexity: float
    parameters: int
    repaired_loss: float | None = None
    domains: dict[str, float] = field(default_factory=dict)

    @property
    def best_loss(self) -> float:
        """Loss as it will be written: repaired where that lowers it, or cures an overflow."""
        known = (self.loss, self.repaired_loss)
        return min((loss for loss in known if loss is not None and math.isfinite(loss)), default=self.loss)


@dataclass(frozen=True)
class Verified(Artefact):
    """All candidates of a run, lowest measured loss first.

    Attributes:
        base_loss: of the intact model, nats per token.
        candidates: by measured loss; those that proposed the same removal stand side by side.
        spearman: rank correlation of energy and loss over the distinct candidates; None for fewer than three.
        forward_tokens: cost, in tokens through the whole intact stack.

    """

    base_loss: float
    candidates: tuple[Candidate, ...]
    spearman: float | None
    forward_tokens: float

    @property
    def best(self) -> Candidate:
        """The candidate of lowest measured loss, repaired where it was."""
        return self.ranked[0]

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """One candidate for each removal of finite loss, the lowest first, repaired where it was."""
        # Reversed, so that of those who proposed the same removal the first keeps it.
        distinct = {c.removed: c for c in reversed(self.candidates)}.values()
        finite = (c for c in distinct if math.isfinite(c.best_loss))
        return tuple(sorted(finite, key=lambda c: (c.best_loss, c.removed)))

    def with_repairs(self, losses: Callable[[tuple[int, ...]], float | None]) -> Verified:
        """The same with the loss of each removal after repair, None where it was not repaired."""
        candidates = (replace(c, repaired_loss=losses(c.removed)) for c in self.candidates)
        return replace(self, candidates=tuple(candidates))
