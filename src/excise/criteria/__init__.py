"""Rival criteria: each names the blocks to remove, with its paper; everything downstream is shared with ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from excise.calibration.samples import Samples
from excise.criteria import (
    angular_distance,
    block_influence,
    block_pruner,
    ends,
    evopress,
    llm_drop,
    norm_ratio,
    random_choice,
    shortened_llama,
    sleb,
    sliding_window,
)
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
        work: Path | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Selection:
        """Choose `budget` blocks to remove."""


# Whole blocks. The order is that of tables.
CRITERIA: dict[str, Criterion] = {
    "block-influence": block_influence.one_shot,
    "block-influence-iterative": block_influence.iterative,
    "norm-ratio": norm_ratio.norm_ratio,
    "angular-distance": angular_distance.angular_distance,
    "shortened-llama-perplexity": shortened_llama.perplexity,
    "shortened-llama-taylor": shortened_llama.taylor,
    "sleb": sleb.sleb,
    "evopress": evopress.evopress,
    "evopress-scaled-down": evopress.evopress_scaled_down,
    "swm-figure": sliding_window.figure,
    "swm-code": sliding_window.code,
    "random": random_choice.random_choice,
    "first": ends.first_blocks,
    "last": ends.last_blocks,
}

# Single sublayers: `Selection.sublayers` names what goes, as many as `budget` blocks have; measured with gates off.
SUBLAYER_CRITERIA: dict[str, Criterion] = {
    "block-pruner": block_pruner.block_pruner,
    "llm-drop-attention": llm_drop.attention,
    "llm-drop-feed-forward": llm_drop.feed_forward,
    "llm-drop-joint": llm_drop.joint,
}

__all__ = ["CRITERIA", "SUBLAYER_CRITERIA", "Criterion", "Selection"]
