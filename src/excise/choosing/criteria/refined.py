"""Ours: what the refinement loop finds with an effort of a few calibration passes (see `excise.choosing.refine`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from excise.choosing.criteria.selection import Selection, removable_blocks
from excise.choosing.refine import DEFAULT_EFFORT, refine
from excise.data.samples import Samples
from excise.measuring.objectives import parse_objective
from excise.models.stack import Stack


def refined(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the winner of refinement at its default effort, by the loss.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to remove.
        protected: blocks that stay.
        seed: of everything random.
        work: folder in which measurements and proposals are kept, so that an interrupted search goes on.
        advance: called with tokens × removals measured.

    """
    removable_blocks(stack, budget, protected)
    found = refine(
        stack,
        parse_objective("kl", samples),
        budget,
        tokens=DEFAULT_EFFORT * samples.tokens,
        protected=protected,
        seed=seed,
        work=work / f"{budget}-{seed}" if work else None,  # other budgets' measurements would hide the cost
        advance=advance,
    )
    return Selection("refined", found.removed, forward_tokens=found.forward_tokens)
