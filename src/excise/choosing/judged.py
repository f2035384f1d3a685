"""What a removal costs as it is written, repaired where that helps, on samples: in all, by domain, against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from excise.context import Context
from excise.data.samples import Samples
from excise.ising.problem import Removal
from excise.measuring.measure import measure
from excise.measuring.ratios import by_domain, ratio_error, worst_domain
from excise.plain import Facts
from excise.repair.several import Repairs

# Two-sided, 95 %.
TIE = 1.96


@dataclass(frozen=True, eq=False)
class Judged:
    """Loss sums of one removal as it is written, beside those of the intact model.

    Attributes:
        removed: sorted original indices.
        base: [samples], of the intact model, nats over the counted tokens.
        sums: [samples], of the removal.
        counts: [samples], counted tokens.
        domains: [samples], the samples' categories.

    """

    removed: Removal
    base: Float64[np.ndarray, " samples"]
    sums: Float64[np.ndarray, " samples"]
    counts: Float64[np.ndarray, " samples"]
    domains: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Mean loss, nats per token."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def base_loss(self) -> float:
        """Of the intact model."""
        return float(self.base.sum() / self.counts.sum())

    @property
    def delta(self) -> float:
        """Damage, nats per token."""
        return self.loss - self.base_loss

    @property
    def error(self) -> float:
        """Standard error of `delta` over samples."""
        return ratio_error(self.sums - self.base, self.counts)

    def by_domain(self) -> dict[str, float]:
        """Damage in each domain, nats per token."""
        return by_domain(self.sums - self.base, self.counts, self.domains)

    def worst(self) -> float:
        """Damage in the domain that suffers most, as far as its samples tell it from the mean."""
        return worst_domain(self.sums - self.base, self.counts, self.domains)

    def ties_with(self, best: Judged) -> bool:
        """Whether this is no worse than another beyond chance, on the same samples."""
        behind = self.sums - best.sums
        return float(behind.sum() / self.counts.sum()) <= TIE * ratio_error(behind, self.counts)

    def describe(self) -> Facts:
        """Plain data: what a table shows."""
        return {
            "removed": list(self.removed),
            "delta": self.delta,
            "error": self.error,
            "worst_domain": self.worst(),
            "domains": self.by_domain(),
        }


def halves(held_out: Samples) -> tuple[Samples, Samples]:
    """Held-out samples to choose by, and others to measure the choice on; a single one has to do for both.

    Of several the best on some samples is partly luck, so what is told of it must come from others.
    """
    return held_out.dealt(2, [0]) if len(held_out) > 1 else (held_out, held_out)


def judge(
    context: Context,
    samples: Samples,
    removals: Sequence[Removal],
    repairs: Repairs | None = None,
    *,
    always: bool = False,
) -> list[Judged]:
    """Measure removals as they would be written.

    Args:
        context: the model and the store, in which measurements are kept.
        samples: held-out samples.
        removals: sorted original indices of each; () is the intact model.
        repairs: of some of them, applied where they help; None measures them without.
        always: apply them whether they help or not.

    """
    repairs = repairs or Repairs()
    intact = measure(context, samples, [()])
    found = []
    for removed in removals:
        # A repair's weights make another model, with measurements of its own.
        with repairs.applied(context.stack, removed, always=always):
            sums = measure(context, samples, [removed]).of(removed)
        found.append(Judged(removed, intact.of(), sums, intact.counts.astype(np.float64), samples.domains))
    return found


def settled(judged: Sequence[Judged]) -> tuple[Removal, list[Facts]]:
    """Of removals that tie with the best, the one whose worst domain suffers least; and all that tie.

    Args:
        judged: on the same samples, at least one of finite loss.

    """
    finite = [each for each in judged if math.isfinite(each.loss)]
    best = min(finite, key=lambda each: each.loss)
    tied = sorted((each for each in finite if each.ties_with(best)), key=lambda each: (each.worst(), each.loss))
    return tied[0].removed, [each.describe() for each in tied]
