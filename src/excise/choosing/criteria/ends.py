"""First M and last M: controls without a measurement; the last blocks are what a careless cut takes away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from excise.choosing.criteria.selection import Selection, removable_blocks
from excise.data.samples import Samples
from excise.models.stack import Stack


def first_blocks(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the lowest `budget` blocks; `samples`, `seed` and `advance` are not used."""
    return Selection("first", tuple(removable_blocks(stack, budget, protected)[:budget]))


def last_blocks(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the highest `budget` blocks; `samples`, `seed` and `advance` are not used."""
    return Selection("last", tuple(removable_blocks(stack, budget, protected)[-budget:]))
