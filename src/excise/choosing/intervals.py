"""From what methods chose and what it costs on held-out samples to rows of a comparison, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from excise.choosing.proposal import Proposal
from excise.evaluation.intervals import REPLICATES, quantiles
from excise.ising.energies import Energy
from excise.measuring.ratios import by_domain
from excise.models.stack import Stack
from excise.plain import Facts

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Choice:
    """What one method chose at one budget, and what that costs.

    Attributes:
        method: name of the criterion.
        budget: M.
        seed: of its random part.
        proposal: what it chose.
        sums: [samples], loss sums on the held-out samples, nats; after repair, where it was repaired.
        pruned: the same before repair; None where it was not repaired.

    """

    method: str
    budget: int
    seed: int
    proposal: Proposal
    sums: Float64[np.ndarray, " samples"]
    pruned: Float64[np.ndarray, " samples"] | None = None


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: name of the criterion.
        remove: budget M.
        removed: blocks removed whole, sorted original indices; empty for the mean of random draws.
        sublayers: names of the sublayers removed, for a sublayer criterion.
        merge: rule by which runs of `removed` were merged into the block kept, or None.
        energy: under the comparison's energy model; None for a merge, which it does not describe.
        loss: on the held-out text, nats per token; after closed-form repair, where there was one.
        delta: loss less that of the intact model.
        interval: of `delta`, 95 %, from a paired bootstrap over samples (for random draws, over draws too).
        behind: `delta` less that of the best at this budget.
        behind_interval: 95 % interval of that difference, paired too; one that contains 0 is a tie.
        perplexity: exp(loss).
        forward_tokens: what choosing cost, in tokens through the whole intact stack.
        backward_tokens: likewise backwards; weights are frozen save for Taylor+.
        seconds: what choosing took.
        parameters: parameters that hold weight after removal.
        draws: for random, each draw's `seed`, `removed` and `delta`.
        note: what a reader must know.
        pruned_delta: `delta` before repair (the mean over draws, for random); None where nothing was repaired.
        domains: `delta` in each category of the held-out samples.

    """

    method: str
    remove: int
    removed: tuple[int, ...]
    sublayers: tuple[str, ...]
    merge: str | None
    energy: float | None
    loss: float
    delta: float
    interval: tuple[float, float]
    behind: float
    behind_interval: tuple[float, float]
    perplexity: float
    forward_tokens: float
    backward_tokens: float
    seconds: float
    parameters: int
    draws: tuple[Facts, ...] = ()
    note: str = ""
    pruned_delta: float | None = None
    domains: dict[str, float] = field(default_factory=dict)

    @property
    def forward_equivalents(self) -> float:
        """Cost as forward tokens; a backward pass through frozen weights costs what a forward pass does."""
        return self.forward_tokens + self.backward_tokens


@dataclass(frozen=True, eq=False)
class Judge:
    """Turns loss sums into rows, with intervals from one set of resampled samples for all of them.

    Args:
        stack: the model.
        gates: energy over its gates, shown beside the damage.
        base: [samples], loss sums of the intact model, nats.
        counts: [samples], counted tokens.
        seed: of the bootstrap.
        domains: [samples], their categories.

    """

    stack: Stack
    gates: Energy
    base: Floats
    counts: Floats
    seed: int = 0
    domains: tuple[str, ...] = ()

    def rows(self, choices: Sequence[Choice]) -> list[Row]:
        """Rows of one budget, lowest loss first; several seeds of one method become one row, their mean."""
        by_method: dict[str, list[Choice]] = {}
        for choice in choices:
            by_method.setdefault(choice.method, []).append(choice)
        excess = {method: np.array([c.sums - self.base for c in drawn]) for method, drawn in by_method.items()}
        deltas = {method: self._mean(values) for method, values in excess.items()}
        # The same resamples for all methods: differences are paired, and intervals of a difference much narrower than
        # of a loss.
        resampled = {method: self._resample(values) for method, values in excess.items()}
        best = min(deltas, key=lambda method: (math.isnan(deltas[method]), deltas[method]))
        rows = [
            Row(
                **self._facts(drawn),
                **self._damage(deltas[method]),
                interval=quantiles(resampled[method]),
                behind=deltas[method] - deltas[best],
                behind_interval=quantiles(resampled[method] - resampled[best]),
                domains=by_domain(excess[method].mean(axis=0), self.counts, self.domains),
                pruned_delta=self._before_repair(drawn),
            )
            for method, drawn in by_method.items()
        ]
        return sorted(rows, key=lambda row: (math.isnan(row.delta), row.delta))

    def _before_repair(self, drawn: Sequence[Choice]) -> float | None:
        pruned = [c.pruned for c in drawn if c.pruned is not None]
        return self._mean(np.array(pruned) - self.base) if pruned else None

    def _mean(self, excess: Floats) -> float:
        return float(excess.mean(axis=0).sum() / self.counts.sum())

    def _resample(self, excess: Floats) -> Floats:
        """Bootstrap replicates [replicates] of the mean of `excess` [draws, samples] per counted token."""
        # Seeded anew in each call, which is what makes the resamples the same for all.
        generator = np.random.default_rng(self.seed)
        draws, samples = excess.shape
        # Counts per sample rather than drawn rows: a replicate is then one product.
        weights = generator.multinomial(samples, np.full(samples, 1 / samples), REPLICATES)
        shares = generator.multinomial(draws, np.full(draws, 1 / draws), REPLICATES) / draws
        # A ratio of resampled sums: samples differ in length, and the mean is per token.
        return np.einsum("rs,rd,ds->r", weights, shares, excess, optimize=True) / (weights @ self.counts)

    def _damage(self, delta: float) -> Facts:
        loss = float(self.base.sum() / self.counts.sum()) + delta
        return {"loss": loss, "delta": delta, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def _facts(self, drawn: Sequence[Choice]) -> Facts:
        choice, at_random = drawn[0], len(drawn) > 1
        proposal = choice.proposal
        energies = [self.gates.energy(c.proposal.gates(self.stack)) for c in drawn]
        return {
            "method": choice.method,
            "remove": choice.budget,
            "removed": () if at_random else proposal.removed,
            "sublayers": tuple(self.stack.sublayers[gate].name for gate in proposal.sublayers),
            "merge": proposal.merge,
            # The energy speaks of gates at 0; a merge is another change.
            "energy": None if proposal.merge else float(np.mean(energies)),
            "forward_tokens": float(proposal.cost.forward_tokens),
            "backward_tokens": float(proposal.cost.backward_tokens),
            "seconds": round(proposal.cost.seconds, 3),
            "parameters": proposal.parameters_left(self.stack),
            "draws": tuple(self._draw(c) for c in drawn) if at_random else (),
            "note": f"mean of {len(drawn)} draws" if at_random else proposal.note,
        }

    def _draw(self, choice: Choice) -> Facts:
        delta = self._mean((choice.sums - self.base)[None])
        return {"seed": choice.seed, "removed": choice.proposal.removed, "delta": delta}
