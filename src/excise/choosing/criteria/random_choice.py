"""Random removal: the control that every criterion must beat."""

from __future__ import annotations

import random

import numpy as np

from excise.choosing.brief import Brief
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.energies import Energy
from excise.ising.solvers.kernels import random_state
from excise.ising.solvers.places import open_states


def random_choice(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove blocks drawn uniformly with the brief's seed; `samples` are not looked at."""
    if brief.pattern is not None:
        # Hardly any draw keeps a pattern: those that do are drawn among themselves, all equally likely.
        nothing = Energy(None, np.zeros((len(context.stack.blocks),) * 2))
        reduced = brief.problem(context.stack, nothing).reduced()
        (state,) = open_states(reduced, 1, random_state(brief.seed))
        return [Proposal("random", reduced.removed(state))]
    drawn = random.Random(brief.seed).sample(brief.candidates(context.stack), brief.budget)
    return [Proposal("random", tuple(sorted(drawn)))]
