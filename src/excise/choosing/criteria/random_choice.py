"""Random removal: the control that every criterion must beat."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from excise.choosing.criteria.selection import Selection, removable_blocks
from excise.data.samples import Samples
from excise.models.stack import Stack


def random_choice(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove `budget` blocks drawn uniformly with `seed`; neither `samples` nor `advance` is used."""
    candidates = removable_blocks(stack, budget, protected)
    return Selection("random", tuple(sorted(random.Random(seed).sample(candidates, budget))))
