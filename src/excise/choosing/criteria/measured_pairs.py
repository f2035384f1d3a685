"""Ours: the ground state of the energy that equals the measured damage of every single and every pair of blocks.

Measured on a few tokens, since there are N (N + 1) / 2 of them; along the trie that costs about N² / 6 forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from excise.choosing.criteria.selection import Selection, removable_blocks
from excise.data.samples import Samples
from excise.ising.energies.pairs import pairs, singles_and_pairs
from excise.ising.solvers import solve
from excise.measuring.objectives import parse_objective
from excise.models.removable import block_problem
from excise.models.stack import Stack

TOKENS = 512
TIME_LIMIT = 60.0


def measured_pairs(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the ground state of the energy of measured singles and pairs.

    Args:
        stack: the model.
        samples: calibration samples, of which the first `TOKENS` tokens are used.
        budget: number of blocks to remove.
        protected: blocks that stay.
        seed: of the solver.
        work: folder in which measurements are kept, so that an interrupted search goes on.
        advance: called with tokens × removals measured.

    """
    candidates = removable_blocks(stack, budget, protected)
    objective = parse_objective("loss", samples.first_tokens(TOKENS))
    damages = objective.damages(stack, [(), *singles_and_pairs(candidates)], ledger=work, advance=advance)
    measured = dict(zip(damages.removals, damages.values.tolist(), strict=True))
    problem = block_problem(stack, pairs(measured, len(stack.blocks)), budget, protected)
    spectrum = solve(problem, states=1, seed=seed, time_limit=TIME_LIMIT)
    return Selection(
        "pairs",
        spectrum[0].removed,
        forward_tokens=float(damages.costs.sum()),
        note="" if spectrum.certified else "the spectrum was not proved within its time limit",
    )
