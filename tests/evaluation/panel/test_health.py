"""Repetition, loops and where two answers part."""

import pytest

from excise.evaluation.panel.health import common_start, distinct, longest_loop


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([], 0),
        ([1], 0),
        ([1, 1], 0),
        ([1, 1, 1], 3),
        ([1, 2, 1, 2], 0),
        ([5, 1, 2, 1, 2, 1, 2, 1], 7),
        ([*range(40)] * 3, 0),
        ([*range(20)] * 3, 60),
        ([1, 1, 1, 2, 3, 4, 3, 4, 3, 4], 6),
    ],
)
def test_the_longest_loop(tokens, loop):
    assert longest_loop(tokens) == loop


def test_distinct_pieces():
    assert distinct([1, 2]) == (0, 0)
    assert distinct([1, 1, 1, 1]) == (1, 2)
    assert distinct([*range(10)]) == (8, 8)


def test_where_answers_part():
    assert common_start([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_start([1, 2], [1, 2, 3]) == 2
    assert common_start([], [1]) == 0
