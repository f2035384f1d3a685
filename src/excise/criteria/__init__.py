"""Rival criteria: each names the blocks to remove, with its paper; everything downstream is shared with ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from excise.calibration.samples import Samples
from excise.criteria import block_influence, norm_ratio, random_choice
from excise.criteria.selection import Selection
from excise.models.stack import Stack


class Criterion(Protocol):
    """The one signature of all criteria."""

    def __call__(
        self,
        stack: Stack,
        samples: Samples,
        budget: int,
        *,
        protected: Sequence[int] = (),
        seed: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> Selection:
        """Choose `budget` blocks to remove."""


CRITERIA: dict[str, Criterion] = {
    "block-influence": block_influence.one_shot,
    "block-influence-iterative": block_influence.iterative,
    "norm-ratio": norm_ratio.norm_ratio,
    "random": random_choice.random_choice,
}

__all__ = ["CRITERIA", "Criterion", "Selection"]
