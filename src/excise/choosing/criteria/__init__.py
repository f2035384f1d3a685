"""Criteria, ours and our rivals': each names the blocks to remove; everything downstream is shared."""

from __future__ import annotations

from collections.abc import Callable

from excise.choosing.brief import Brief
from excise.choosing.criteria import (
    angular_distance,
    block_influence,
    block_pruner,
    cooperative_game,
    ends,
    evopress,
    ground_states,
    llm_drop,
    measured_pairs,
    norm_ratio,
    prune_and_comp,
    random_choice,
    refined,
    repaired_fisher,
    shortened_llama,
    sleb,
    sliding_window,
)
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples

# Chooses what a brief asks for by looking at samples; where one knows several answers, the best first.
Criterion = Callable[[Context, Samples, Brief], list[Proposal]]

# Whole blocks. The order is that of tables.
CRITERIA: dict[str, Criterion] = {
    "fisher": ground_states.GroundState("fisher"),
    "fisher+linear": ground_states.GroundState("fisher+linear"),
    "repaired-fisher": repaired_fisher.repaired_fisher,
    "path": ground_states.path_ground_state,
    "pairs": measured_pairs.measured_pairs,
    "fisher-verified": ground_states.GroundState("fisher", verified=True),
    "fisher+linear-verified": ground_states.GroundState("fisher+linear", verified=True),
    "refined": refined.refined,
    "block-influence": block_influence.one_shot,
    "block-influence-iterative": block_influence.iterative,
    "prune-and-comp": prune_and_comp.prune_and_comp,
    "norm-ratio": norm_ratio.norm_ratio,
    "angular-distance": angular_distance.angular_distance,
    "shortened-llama-perplexity": shortened_llama.perplexity,
    "shortened-llama-taylor": shortened_llama.Taylor(),
    "sleb": sleb.sleb,
    "cooperative-game": cooperative_game.cooperative_game,
    "evopress": evopress.EvoPress("evopress", evopress.PUBLISHED),
    "evopress-scaled-down": evopress.EvoPress("evopress-scaled-down", evopress.SCALED_DOWN),
    "swm-figure": sliding_window.SlidingWindow("figure"),
    "swm-code": sliding_window.SlidingWindow("code"),
    "random": random_choice.random_choice,
    "first": ends.first_blocks,
    "last": ends.last_blocks,
}

# Single sublayers: `Proposal.sublayers` names what goes, as many as `budget` blocks have; measured with gates off.
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
        "cooperative-game",
        "evopress",
        "evopress-scaled-down",
        "swm-figure",
        "swm-code",
        "block-pruner",
    }
)
# These heed that what is removed will be repaired.
AFTER_REPAIR = frozenset({"refined"})
# About a hundred times the cost of the next: only by name.
EXPENSIVE = frozenset({"evopress"})

__all__ = ["CRITERIA", "EXPENSIVE", "RANDOM", "SEARCHING", "SUBLAYER_CRITERIA", "Criterion"]
