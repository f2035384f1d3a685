"""Ours: the lowest energy of gradients after the kept gates have moved (see `excise.ising.energies.repaired_fisher`).

That energy is no quadratic function of what is removed, so there is no spectrum to prove: blocks are taken one at a
time, each the one that leaves the least, and then swapped for kept ones until no swap lowers it. Every state is
evaluated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.energies.repaired_fisher import RepairedFisher
from excise.ising.problem import Removal
from excise.measuring.score import score

Energies = Callable[[Sequence[Removal]], Sequence[float]]


def repaired_fisher(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove what greedy descent and swaps find; the gradients are shared with everyone who looks at the samples."""
    candidates = brief.candidates(context.stack)
    gradients = score(context, samples)
    energy = RepairedFisher.of(gradients.A, gradients.gate_blocks)
    removed = lowest_by_swaps(energy.energies, candidates, brief.budget)
    cost = Cost(float(samples.tokens), float(samples.tokens))
    return [Proposal("repaired-fisher", removed, cost=cost, note="no single swap lowers its energy; no proof beyond")]


def lowest_by_swaps(energies: Energies, candidates: Sequence[int], budget: int) -> Removal:
    """A removal whose energy no swap of one block for another lowers, found from a greedy start.

    Args:
        energies: of several removals.
        candidates: blocks that may go.
        budget: how many do.

    """
    removed: Removal = ()
    while len(removed) < budget:
        removed, _ = _lowest(energies, [(*removed, i) for i in candidates if i not in removed])
    least = energies([removed])[0]
    while swaps := [
        (*(i for i in removed if i != back), gone) for back in removed for gone in candidates if gone not in removed
    ]:
        best, energy = _lowest(energies, swaps)
        if not energy < least:
            break
        removed, least = best, energy
    return removed


def _lowest(energies: Energies, removals: Sequence[Removal]) -> tuple[Removal, float]:
    distinct = [tuple(sorted(removed)) for removed in removals]
    values = energies(distinct)
    best = min(range(len(values)), key=values.__getitem__)
    return distinct[best], values[best]
