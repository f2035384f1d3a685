"""Health of generated text: whether it goes on saying new things, or runs in a loop."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens of the pieces whose distinctness counts.
PIECE = 3
# Of one token to a long sentence.
LONGEST_PERIOD = 32
# A phrase that comes twice is no loop.
REPEATS = 3


def distinct(tokens: Sequence[int]) -> tuple[int, int]:
    """How many different runs of `PIECE` tokens there are, and how many in all: distinct-3 is their ratio.

    Source: Li et al., A diversity-promoting objective function for neural conversation models (2016), section 5.

    Examples:
        >>> distinct([1, 2, 3, 1, 2, 3])
        (3, 4)

    """
    pieces = [tuple(tokens[i : i + PIECE]) for i in range(len(tokens) - PIECE + 1)]
    return len(set(pieces)), len(pieces)


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that says a phrase of at most `LONGEST_PERIOD` tokens `REPEATS` times or more.

    Examples:
        >>> longest_loop([9, 1, 2, 1, 2, 1, 2, 7]), longest_loop([1, 2, 3, 4])
        (6, 0)

    """
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPEATS) + 1):
        run = 0
        for place in range(period, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            if run >= (REPEATS - 1) * period:
                longest = max(longest, run + period)
    return longest


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before two continuations part; all of the shorter one where it is the other's beginning."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
