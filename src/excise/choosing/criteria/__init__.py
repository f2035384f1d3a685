"""Criteria, ours and our rivals': each names the blocks to remove; everything downstream is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from excise.choosing.criteria import (
    angular_distance,
    block_influence,
    block_pruner,
    ends,
    evopress,
    ground_states,
    llm_drop,
    measured_pairs,
    norm_ratio,
    random_choice,
    refined,
    shortened_llama,
    sleb,
    sliding_window,
)
from excise.choosing.criteria.selection import Selection
from excise.data.samples import Samples
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
    "fisher": ground_states.ground_state("fisher"),
    "fisher+linear": ground_states.ground_state("fisher+linear"),
    "path": ground_states.path_ground_state,
    "pairs": measured_pairs.measured_pairs,
    "fisher-verified": ground_states.ground_state("fisher", verified=True),
    "fisher+linear-verified": ground_states.ground_state("fisher+linear", verified=True),
    "refined": refined.refined,
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

RANDOM = "random"
# These measure many candidates: a comparison lets them do so on a part of the calibration samples.
SEARCHING = frozenset(
    {
        "shortened-llama-perplexity",
        "shortened-llama-taylor",
        "sleb",
        "evopress",
        "evopress-scaled-down",
        "swm-figure",
        "swm-code",
        "block-pruner",
    }
)
EXPENSIVE = frozenset({"evopress"})  # about a hundred times the cost of the next: only by name

__all__ = ["CRITERIA", "EXPENSIVE", "RANDOM", "SEARCHING", "SUBLAYER_CRITERIA", "Criterion", "Selection"]
