"""How the effort of a refinement is divided among single removals, rounds of the loop and the race."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The loop's winner is the least of many noisy values, each of one slice, so part of the effort goes to telling the best
# apart on more tokens.
RACE_SHARE = 0.3
# Two stages, as the first of a race once ran on the tokens of the loop and told nothing new (log, 2026-11-24,
# refinement's default effort).
FINALISTS, STAGES = 8, 2
# More in a round would rest on a staler fit; where all weights are read for each round, reading counts more, and so
# many rounds are put into one.
BATCH, STREAMED_ROUNDS = 8, 3
# Random removals tell how far to trust predictions away from the best; of fewer than four no rank correlation is given.
ANCHORS = 8
# Of a full forward pass that a removal costs along the trie, about.
SHARED = 0.55
# Five rounds were enough in all runs, the best found in the fourth or fifth (log, 2026-11-24, loss or divergence).
# What is left over buys a larger slice: of 1,024 tokens four samples judge, and err twice as much as the eight of 2,048
# (log, 2026-11-30, what a round measures). From there on more rounds tell the energy more than more tokens do, until
# there are twelve (log, 2026-11-30, more effort).
FEWEST_ROUNDS, GOOD_ROUNDS, MANY_ROUNDS, MOST_ROUNDS = 2, 5, 12, 30
GOOD_SLICE = 2048
# About one chat: on less, damage would be that of the text and not of the removal.
LEAST_SLICE = 128


@dataclass(frozen=True)
class Plan:
    """How an effort is spent.

    Attributes:
        slice_tokens: tokens of the samples that the loop measures on.
        rounds: of the loop.
        batch: removals measured in each.
        race_tokens: tokens of the samples of each stage of the race, FINALISTS, half of them, and so on.

    """

    slice_tokens: int
    rounds: int
    batch: int
    race_tokens: tuple[int, ...]

    def measurements(self, units: int) -> int:
        """Tokens × removals measured, about, for a progress bar.

        Args:
            units: removable blocks.

        """
        loop = self.slice_tokens * (1 + units + ANCHORS + self.rounds * self.batch)
        return loop + sum(t * (1 + max(1, FINALISTS >> stage)) for stage, t in enumerate(self.race_tokens))


def plan(units: int, removed: int, tokens: float, *, streamed: bool = False) -> Plan:
    """Divide a number of forward tokens among singles, rounds and race.

    The loop gets as many tokens a measurement as leave it five rounds of eight, twelve where these are more than 2,048,
    and no fewer than two rounds.

    Args:
        units: removable blocks.
        removed: budget M.
        tokens: forward tokens to spend.
        streamed: whether every round reads all weights anew.

    Examples:
        >>> plan(units=30, removed=8, tokens=40_000)
        Plan(slice_tokens=512, rounds=8, batch=8, race_tokens=(1086, 2172))

    """
    # The more is removed, the less of the stack is left to run. A plan is a guess: of 33,000 tokens planned 29,000 to
    # 39,000 were spent (log, 2026-11-24, refinement's default effort).
    share = SHARED * (units - removed) / units + 0.1
    # A single shares the blocks below it with others, so it costs about half the stack.
    opening = 0.55 * units + ANCHORS * share
    searching, racing = (1 - RACE_SHARE) * tokens, RACE_SHARE * tokens

    def rounds_of(tokens: int) -> float:
        return (searching / tokens - opening) / (BATCH * share)

    slice_tokens = LEAST_SLICE
    # Powers of two, so that efforts a little apart share a slice, and with it everything measured on it.
    while rounds_of(2 * slice_tokens) >= (GOOD_ROUNDS if slice_tokens < GOOD_SLICE else MANY_ROUNDS):
        slice_tokens *= 2
    rounds = math.floor(rounds_of(slice_tokens))
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, rounds))
    # As many removals in any case: an effort that pays for few must not be spent several times over.
    removals = rounds * BATCH
    rounds = max(FEWEST_ROUNDS, rounds // STREAMED_ROUNDS) if streamed else rounds
    # Passes of the intact model over as many tokens as the first stage has: 1 + 2 + …
    intact = 2**STAGES - 1
    # Half as many on twice the tokens: every stage costs the same. Not below the slice, on which all are measured
    # already.
    first = max(slice_tokens, round(racing / (STAGES * FINALISTS * share + intact)))
    return Plan(
        slice_tokens,
        rounds,
        removals // rounds,
        tuple(first * 2**stage for stage in range(STAGES)),
    )
