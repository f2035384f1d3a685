"""Ours: the ground state of the energy that equals the measured damage of every single and every pair of blocks.

Measured on a few tokens, since there are N (N + 1) / 2 of them; along the trie that costs about N² / 6 forward passes.
"""

from __future__ import annotations

from excise.choosing.brief import Brief
from excise.choosing.criteria.ground_states import states_of
from excise.choosing.objectives import parse_objective
from excise.choosing.proposal import Cost, Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.energies.pairs import pairs, singles_and_pairs

# N (N + 1) / 2 removals are measured, 465 at 30 blocks, which even so took 86,000 forward tokens (docs/results.md).
TOKENS = 512


def measured_pairs(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the ground state of the energy of singles and pairs, measured on the first `TOKENS` tokens."""
    objective = parse_objective("loss", samples.first_tokens(TOKENS))
    damages = objective.damages(context, [(), *singles_and_pairs(brief.candidates(context.stack))])
    measured = dict(zip(damages.removals, damages.values.tolist(), strict=True))
    energy = pairs(measured, len(context.stack.blocks))
    return states_of("pairs", brief.problem(context.stack, energy), brief.seed, Cost(float(damages.costs.sum())))
