"""Ours: states of an Ising energy of gate gradients, as criteria to be compared with the others.

`fisher` and `fisher+linear` remove the ground state of those energies (see `excise.ising.energies.fisher`), the first
as the paper does (Jansen et al., 2026). The `-verified` ones measure the lowest states on a few of the calibration
samples and remove the one that costs least. `path` takes its gradients between intact and removed (see
`excise.ising.energies.path`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.energies import ENERGIES
from excise.ising.energies.path import path, path_positions
from excise.ising.problem import Problem
from excise.ising.solvers import solve
from excise.measuring.measure import measure
from excise.measuring.score import score
from excise.team import team

STATES = 20
VERIFY_TOKENS = 1024
TIME_LIMIT = 60.0


@dataclass(frozen=True)
class GroundState:
    """Criterion that removes the lowest state of an energy, or the one measured lowest among the `STATES` lowest.

    Attributes:
        energy: a name in `excise.ising.energies.ENERGIES`.
        verified: measure the states on the first `VERIFY_TOKENS` tokens of the samples.

    """

    energy: str
    verified: bool = False

    def __call__(self, context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
        """Choose; the gradients are shared with everyone who looks at the same samples."""
        # A budget that does not fit is refused before the gradients.
        brief.candidates(context.stack)
        gradients = score(context, samples)
        problem = brief.problem(context.stack, ENERGIES[self.energy](gradients.blocks()))
        # One pass forward and one backward, however many energies share them.
        cost = Cost(float(samples.tokens), float(samples.tokens))
        if not self.verified:
            return states_of(self.energy, problem, brief.seed, cost)
        method = f"{self.energy}-verified"
        states = states_of(method, problem, brief.seed, cost, STATES)
        # On calibration, never on held-out samples: who is judged there must not have looked.
        measured = measure(context, samples.first_tokens(VERIFY_TOKENS), [state.removed for state in states])
        losses = np.where(np.isnan(measured.losses), np.inf, measured.losses)
        lowest = measured.removals[int(np.argmin(losses))]
        cost = replace(cost, forward_tokens=cost.forward_tokens + measured.forward_tokens)
        return [Proposal(method, lowest, cost=cost, note=states[0].note)]


def path_ground_state(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the ground state of the energy of gradients taken on the way from intact to removed."""
    brief.candidates(context.stack)
    positions = path_positions(len(context.stack.blocks), len(samples), [brief.budget], brief.seed)
    gradients = score(context, samples, positions=positions)
    assert gradients.positions is not None
    problem = brief.problem(context.stack, path(gradients.blocks(), gradients.positions))
    return states_of("path", problem, brief.seed, Cost(float(samples.tokens), float(samples.tokens)))


def states_of(method: str, problem: Problem, seed: int, cost: Cost, count: int = 1) -> list[Proposal]:
    """The lowest states of a problem as proposals, with a note where that is not proved."""
    spectrum = team().once(lambda: solve(problem, states=count, seed=seed, time_limit=TIME_LIMIT))
    note = "" if spectrum.certified else "the spectrum was not proved within its time limit"
    return [Proposal(method, state.removed, cost=cost, note=note) for state in spectrum]
