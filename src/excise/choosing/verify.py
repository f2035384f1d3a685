"""Candidates beside their measured damage on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.energies import Energy
from excise.measuring.measure import measure
from excise.models.stack import Stack, block_indices


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

    """

    method: str
    removed: tuple[int, ...]
    energy: float
    loss: float
    delta: float
    perplexity: float
    parameters: int
    repaired_loss: float | None = None

    @property
    def best_loss(self) -> float:
        """Loss as it will be written: repaired where that lowers it."""
        after = self.repaired_loss
        return after if after is not None and after < self.loss else self.loss


@dataclass(frozen=True)
class Verified:
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
        distinct = {c.removed: c for c in reversed(self.candidates)}.values()
        finite = (c for c in distinct if math.isfinite(c.best_loss))
        return tuple(sorted(finite, key=lambda c: (c.best_loss, c.removed)))

    def with_repairs(self, losses: Callable[[tuple[int, ...]], float | None]) -> Verified:
        """The same with the loss of each removal after repair, None where it was not repaired."""
        candidates = (replace(c, repaired_loss=losses(c.removed)) for c in self.candidates)
        return replace(self, candidates=tuple(candidates))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def verify(
    stack: Stack,
    samples: Samples,
    proposals: Sequence[tuple[str, Sequence[int]]],
    energy: Energy,
    *,
    batch_tokens: int | None = None,
    ledger: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Verified:
    """Measure every proposal on held-out samples.

    Args:
        stack: the model.
        samples: held-out samples, not those of the calibration.
        proposals: (method, removed) pairs; removals proposed twice are measured once.
        energy: the energy shown beside the loss, over blocks.
        batch_tokens: padded tokens a batch.
        ledger: folder in which measurements are kept and found again.
        advance: called with tokens × distinct removals of each finished batch.

    Raises:
        InputError: no proposal, or none with a finite loss.

    """
    if not proposals:
        raise InputError("nothing to verify: expected at least one proposed removal")
    removals = [block_indices(stack, removed) for _, removed in proposals]
    measured = measure(stack, samples, [(), *removals], batch_tokens=batch_tokens, ledger=ledger, advance=advance)
    losses: Mapping[tuple[int, ...], float] = dict(zip(measured.removals, measured.losses.tolist(), strict=True))
    base = losses[()]
    if not math.isfinite(base):
        raise InputError("the intact model's loss on the held-out samples is not finite; try --dtype float32")
    total = sum(p.numel() for p in stack.model.parameters())
    candidates = [
        Candidate(
            method,
            removed,
            energy.energy(removed),
            losses[removed],
            losses[removed] - base,
            _perplexity(losses[removed]),
            total - sum(stack.blocks[i].parameters for i in removed),
        )
        for (method, _), removed in zip(proposals, removals, strict=True)
    ]
    candidates.sort(key=lambda c: (not math.isfinite(c.loss), c.loss, c.removed))
    if not math.isfinite(candidates[0].loss):
        raise InputError("no candidate has a finite loss; try --dtype float32")
    return Verified(base, tuple(candidates), _spearman(candidates), measured.forward_tokens)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _spearman(candidates: Sequence[Candidate]) -> float | None:
    pairs = {c.removed: (c.energy, c.loss) for c in candidates if math.isfinite(c.loss)}
    if len(pairs) < 3:
        return None
    energies, losses = zip(*pairs.values(), strict=True)
    rho = float(spearmanr(energies, losses).statistic)
    return rho if math.isfinite(rho) else None
