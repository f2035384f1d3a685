"""Ours: what the refinement loop finds with an effort of a few calibration passes (see `excise.choosing.refine`)."""

from __future__ import annotations

from excise.choosing.brief import Brief
from excise.choosing.objectives import parse_objective
from excise.choosing.proposal import Cost, Proposal
from excise.choosing.refine import refine
from excise.context import Context
from excise.data.samples import Samples
from excise.repair.several import is_repairable
from excise.settings import DEFAULT_EFFORT


def refined(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the winner of refinement at its default effort, by the divergence from the intact model.

    Where the choice will be repaired, by what is left of it after repair, if the model can be repaired at all. It
    starts from nothing: what was measured for other budgets would make it better than its cost says.
    """
    repaired = brief.repaired and is_repairable(context.loaded, samples)
    objective = parse_objective("kl", samples, repaired=repaired)
    found = refine(context, objective, brief, tokens=DEFAULT_EFFORT * samples.tokens, alone=True)
    return [Proposal("refined", found.removed, cost=Cost(found.forward_tokens))]
