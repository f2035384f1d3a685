"""What `run` and `compare` share: criteria propose, their proposals are measured on held-out samples and repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from excise.choosing.brief import Brief
from excise.choosing.criteria import AFTER_REPAIR, CRITERIA, SUBLAYER_CRITERIA
from excise.choosing.judged import judge
from excise.choosing.proposal import Cost, Meter, Proposal, at_smaller_budget
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.problem import Removal
from excise.measuring.measure import measure
from excise.measuring.passes import pass_key
from excise.repair.several import repair_removals
from excise.surgery.merge import merging

PROPOSALS = "proposals"
EVERY_CRITERION = {**CRITERIA, **SUBLAYER_CRITERIA}

Floats = NDArray[np.float64]


def propose(context: Context, samples: Samples, name: str, brief: Brief) -> Proposal:
    """What a criterion answers, as the store has it or by asking; forced blocks go first, it fills the budget.

    Args:
        context: the model and the store.
        samples: calibration samples.
        name: of the criterion.
        brief: what is asked of it.

    Raises:
        InputError: the criterion cannot meet the brief.
        ArchitectureError: it is not defined for this model.

    """
    # Others choose the same with repair and without, and need not choose twice.
    brief = replace(brief, repaired=brief.repaired and name in AFTER_REPAIR)
    rest = brief.rest()
    # Nothing is left to choose, and criteria need not know what to do with a budget of 0.
    if rest.budget == 0:
        return Proposal(name, brief.forced)
    key = {**pass_key(context, samples, {}), "criterion": name, "brief": asdict(brief)}
    if kept := context.team.once(lambda: context.store.found(PROPOSALS, key)):
        return _from_plain(kept)
    meter = Meter(context)
    with context.progress.stage(f"{name}, M = {brief.budget}", None):
        best = EVERY_CRITERION[name](context, samples, rest)[0]
    removed = tuple(sorted((*best.removed, *brief.forced)))
    # Seconds by the one clock that counts reused passes, not by a criterion's own.
    best = replace(best, removed=removed, cost=replace(best.cost, seconds=meter.seconds))
    context.store.keep(PROPOSALS, key, asdict(best))
    return best


def propose_budgets(
    context: Context, samples: Samples, name: str, brief: Brief, budgets: Sequence[int]
) -> dict[int, Proposal]:
    """The proposal at every budget, the largest asked first: criteria that nest give the smaller ones for nothing.

    Args:
        context: the model and the store.
        samples: calibration samples.
        name: of the criterion.
        brief: what is asked of it, but for the budget.
        budgets: numbers M of blocks to remove.

    """
    proposed: dict[int, Proposal] = {}
    largest: Proposal | None = None
    # Greedy and ranked choices nest, so one descent at the largest budget answers all smaller ones.
    for budget in sorted(budgets, reverse=True):
        nested = at_smaller_budget(largest, context.stack, budget) if largest else None
        proposed[budget] = nested or propose(context, samples, name, replace(brief, budget=budget))
        largest = largest or proposed[budget]
    return proposed


def propose_amount(context: Context, samples: Samples, name: str, brief: Brief) -> Proposal:
    """The proposal of the fewest blocks that the brief allows; for a brief with a budget, the proposal at that.

    Where none weighs what is asked for, that of the most blocks.
    """
    counts, alone = brief.counts(context.stack), replace(brief, amounts=())
    proposed = propose_budgets(context, samples, name, alone, counts)
    return next((proposed[m] for m in counts if brief.allows(proposed[m].removed)), proposed[counts[-1]])


def _from_plain(kept: dict[str, object]) -> Proposal:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    cost, trail = kept["cost"], kept["trail"]
    assert isinstance(cost, dict)
    assert isinstance(trail, list | tuple)
    return Proposal(**{**fields, "cost": Cost(**cost), "trail": tuple(Cost(**spent) for spent in trail)})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Loss sums on held-out samples.

    Attributes:
        base: [samples], of the intact model, nats over the counted tokens.
        sums: [samples] of each proposal, in their order.
        counts: [samples], counted tokens.
        forward_tokens: cost, in tokens through the whole intact stack.

    """

    base: Floats
    sums: tuple[Floats, ...]
    counts: Floats
    forward_tokens: float

    @property
    def base_loss(self) -> float:
        """Of the intact model, nats per token."""
        return float(self.base.sum() / self.counts.sum())


def measure_proposals(context: Context, samples: Samples, proposals: Sequence[Proposal]) -> HeldOut:
    """Measure what every proposal would do, dropped, with single sublayers off, or merged.

    Args:
        context: the model and the store.
        samples: held-out samples, not those of the calibration.
        proposals: removals proposed twice are measured once.

    Raises:
        InputError: a removal does not fit the model.

    """
    # One call for all that only drop, as those share their lowest blocks along the trie.
    dropped = list(dict.fromkeys(p.removed for p in proposals if p.dropped))
    apart = list(dict.fromkeys(p.sublayers for p in proposals if p.sublayers))
    merged = list(dict.fromkeys((p.removed, p.merge) for p in proposals if p.merge))
    passes = len(dropped) + len(apart) + len(merged) + 1
    with context.progress.stage("held-out", samples.tokens * passes):
        whole = measure(context, samples, [(), *dropped])
        single = measure(context, samples, apart, sublayers=True) if apart else None
        found: dict[tuple[Removal, Removal, str | None], Floats] = {}
        for removed in dropped:
            found[removed, (), None] = whole.of(removed)
        for sublayers in apart:
            assert single is not None
            found |= {(p.removed, sublayers, None): single.of(sublayers) for p in proposals if p.sublayers == sublayers}
        cost = whole.forward_tokens + (single.forward_tokens if single else 0.0)
        for removed, rule in merged:
            # Merged weights make another model, which shares nothing with the others.
            with merging(context.stack, removed, rule):
                alone = measure(context, samples, [removed])
            found[removed, (), rule] = alone.of(removed)
            cost += alone.forward_tokens
    sums = tuple(found[p.removed, p.sublayers, p.merge] for p in proposals)
    return HeldOut(whole.of(), sums, whole.counts.astype(np.float64), cost)


def repaired_sums(
    context: Context, proposals: Sequence[Proposal], samples: Samples, held_out: Samples, *, tokens: int
) -> dict[Removal, Floats]:
    """Loss sums [samples] on held-out samples, nats, of whatever only drops whole blocks and can be repaired.

    Every repair counts, whether it helps or not: which does is for other samples to say. See
    `excise.repair.several.repair_removals`.
    """
    removals = list(dict.fromkeys(p.removed for p in proposals if p.dropped))
    repairs = repair_removals(context, removals, samples, held_out, tokens=tokens)
    judged = judge(context, held_out, [r for r in removals if r in repairs.fitted], repairs, always=True)
    return {each.removed: each.sums for each in judged}
