"""What a criterion answers: blocks to remove, and what finding them cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from excise.choosing.brief import Brief
from excise.context import Context
from excise.ising.problem import Removal
from excise.models.stack import Stack


@dataclass(frozen=True)
class Cost:
    """What choosing took.

    Attributes:
        forward_tokens: tokens through the whole intact stack.
        backward_tokens: tokens back through it.
        seconds: wall time; passes that were found in the store count with what they had taken.

    """

    forward_tokens: float = 0.0
    backward_tokens: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Proposal:
    """Blocks to remove, as a criterion chose them.

    Attributes:
        method: name of the criterion; `fisher:3` is the third excited state of the paper's energy (its CBO:3).
        removed: sorted original indices of blocks; for a sublayer criterion, the blocks of which nothing is left.
        scores: the criterion's score of each block [blocks] (of each sublayer [gates], for a sublayer criterion) in the
            intact model, None for those without one; None where the criterion scores no single blocks.
        order: original indices (gates, for a sublayer criterion) in the order of removal, where a smaller budget would
            have removed the first of them; empty where every budget is another search.
        cost: of choosing.
        sublayers: sorted gate indices of everything a sublayer criterion removes, those of `removed` included.
        merge: rule of `excise.surgery.merge` by which the runs of `removed` are merged into the block kept; None where
            they are dropped.
        note: what a reader must know: where the criterion had to depart from its original.
        trail: what had been spent when each of `order` was removed; empty where the last costs what the first does.

    """

    method: str
    removed: Removal
    scores: tuple[float | None, ...] | None = None
    order: tuple[int, ...] = ()
    cost: Cost = Cost()
    sublayers: tuple[int, ...] = ()
    merge: str | None = None
    note: str = ""
    trail: tuple[Cost, ...] = ()

    @property
    def dropped(self) -> bool:
        """Whether it only drops whole blocks."""
        return not (self.sublayers or self.merge)

    def gates(self, stack: Stack) -> tuple[int, ...]:
        """Gates that it sets to 0."""
        return self.sublayers or tuple(s.gate for i in self.removed for s in stack.blocks[i].sublayers)

    def parameters_left(self, stack: Stack) -> int:
        """Parameters that hold weight after the removal."""
        total = sum(p.numel() for p in stack.model.parameters())
        apart = [stack.sublayers[g] for g in self.sublayers if stack.sublayers[g].block not in self.removed]
        return total - sum(stack.blocks[i].parameters for i in self.removed) - sum(s.parameters for s in apart)


class Meter:
    """Seconds since it was made, the passes that the store had already among them with what they had taken.

    Args:
        context: whose store is asked.

    """

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._reused, self._started = context.store.reused_seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._started + self._store.reused_seconds - self._reused

    def cost(self, forward_tokens: float) -> Cost:
        """What has been spent, where it was so many forward tokens."""
        return Cost(forward_tokens, seconds=self.seconds)


def by_scores(method: str, scores: np.ndarray, brief: Brief, context: Context, cost: Cost) -> Proposal:
    """Proposal of the blocks with the smallest scores [blocks]."""
    order = ranking(scores, brief.budget, brief.candidates(context.stack))
    return Proposal(method, tuple(sorted(order)), tuple(map(float, scores)), order, cost)


def lowest(scores: np.ndarray, budget: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """The `budget` candidates with the smallest scores, sorted; see `ranking`."""
    return tuple(sorted(ranking(scores, budget, candidates)))


def ranking(scores: np.ndarray, budget: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """The `budget` candidates with the smallest scores, smallest first; the lower index where they tie, NaN last."""
    # NaN compares false with everything and would leave the order to chance: it is put last by hand.
    return tuple(sorted(candidates, key=lambda i: (bool(np.isnan(scores[i])), scores[i], i))[:budget])


def sublayer_proposal(
    method: str,
    stack: Stack,
    gates: Sequence[int],
    scores: tuple[float | None, ...],
    cost: Cost,
    trail: Sequence[Cost] = (),
) -> Proposal:
    """Proposal of sublayers: `removed` are the blocks that lose all of theirs.

    Args:
        method: name of the criterion.
        stack: the model.
        gates: in the order of removal.
        scores: of every sublayer [gates].
        cost: of choosing.
        trail: see `Proposal`.

    """
    removed, gone = _all_lost(stack, gates), tuple(sorted(gates))
    return Proposal(method, removed, scores, tuple(gates), cost, gone, trail=tuple(trail))


def _all_lost(stack: Stack, gates: Sequence[int]) -> Removal:
    gone = set(gates)
    return tuple(b.index for b in stack.blocks if all(s.gate in gone for s in b.sublayers))


def sublayer_budget(stack: Stack, budget: int) -> int:
    """Sublayers that weigh as much as `budget` blocks, counted: 2M where a block has attention and feed-forward."""
    return round(budget * len(stack.sublayers) / len(stack.blocks))


def at_smaller_budget(whole: Proposal, stack: Stack, budget: int) -> Proposal | None:
    """What a criterion would have chosen, and spent, with a smaller budget; None where that is another search.

    Args:
        whole: its choice at a larger (or the same) budget.
        stack: the model.
        budget: number of blocks to remove.

    """
    units = sublayer_budget(stack, budget) if whole.sublayers else budget
    # No order means that the method does not nest (a search, a window): the smaller budget is another search.
    if not units <= len(whole.order):
        return None
    if units == len(whole.order):
        return whole
    order = whole.order[:units]
    cost = replace(whole.trail[units - 1], backward_tokens=whole.cost.backward_tokens) if whole.trail else whole.cost
    smaller = replace(whole, cost=cost, order=order, trail=whole.trail[:units], note="")
    if whole.sublayers:
        return replace(smaller, removed=_all_lost(stack, order), sublayers=tuple(sorted(order)))
    return replace(smaller, removed=tuple(sorted(order)))
