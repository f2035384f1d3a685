"""How the effort of a refinement is divided among single removals, rounds of the loop and the race."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_EFFORT = 4.0
RACE_SHARE = 0.3
FINALISTS, STAGES = 8, 2
BATCH = 8
ANCHORS = 8
SHARED = 0.55  # of a full forward pass that a removal costs along the trie, about
MOST_ROUNDS, GOOD_ROUNDS, FEWEST_ROUNDS = 12, 5, 2
LEAST_SLICE = 128


@dataclass(frozen=True)
class Plan:
    """How an effort is spent.

    Attributes:
        slice_tokens: tokens of the samples that the loop measures on.
        rounds: of the loop.
        race_tokens: tokens of the samples of each stage of the race, FINALISTS, half of them, and so on.

    """

    slice_tokens: int
    rounds: int
    race_tokens: tuple[int, ...]

    def measurements(self, units: int) -> int:
        """Tokens × removals measured, about, for a progress bar.

        Args:
            units: removable blocks.

        """
        loop = self.slice_tokens * (1 + units + ANCHORS + self.rounds * BATCH)
        return loop + sum(t * (1 + max(1, FINALISTS >> stage)) for stage, t in enumerate(self.race_tokens))


def plan(units: int, removed: int, tokens: float) -> Plan:
    """Divide a number of forward tokens among singles, rounds and race.

    The loop gets as many tokens a measurement as leave it five rounds, and no fewer than two rounds.

    Args:
        units: removable blocks.
        removed: budget M.
        tokens: forward tokens to spend.

    Examples:
        >>> plan(units=30, removed=8, tokens=40_000)
        Plan(slice_tokens=512, rounds=8, race_tokens=(1086, 2172))

    """
    share = SHARED * (units - removed) / units + 0.1
    opening = 0.55 * units + ANCHORS * share
    searching, racing = (1 - RACE_SHARE) * tokens, RACE_SHARE * tokens
    slice_tokens = LEAST_SLICE
    while searching / (2 * slice_tokens) >= opening + GOOD_ROUNDS * BATCH * share:
        slice_tokens *= 2
    rounds = math.floor((searching / slice_tokens - opening) / (BATCH * share))
    intact = 2**STAGES - 1  # passes of the intact model over as many tokens as the first stage has
    first = max(slice_tokens, round(racing / (STAGES * FINALISTS * share + intact)))
    return Plan(
        slice_tokens,
        min(MOST_ROUNDS, max(FEWEST_ROUNDS, rounds)),
        tuple(first * 2**stage for stage in range(STAGES)),
    )
