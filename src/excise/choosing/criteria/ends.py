"""First M and last M: controls without a measurement; the last blocks are what a careless cut takes away."""

from __future__ import annotations

from excise.choosing.brief import Brief
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples


def first_blocks(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the lowest blocks; `samples` are not looked at."""
    return [Proposal("first", tuple(brief.candidates(context.stack)[: brief.budget]))]


def last_blocks(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the highest blocks; `samples` are not looked at."""
    return [Proposal("last", tuple(brief.candidates(context.stack)[-brief.budget :]))]
