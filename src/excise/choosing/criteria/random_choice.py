"""Random removal: the control that every criterion must beat."""

from __future__ import annotations

import random

from excise.choosing.brief import Brief
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples


def random_choice(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove blocks drawn uniformly with the brief's seed; `samples` are not looked at."""
    drawn = random.Random(brief.seed).sample(brief.candidates(context.stack), brief.budget)
    return [Proposal("random", tuple(sorted(drawn)))]
