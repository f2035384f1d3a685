from __future__ import annotations

from excise.choosing.criteria import CRITERIA
from excise.models.stack import find_stack
from tests.contexts import chosen
from tests.random_samples import random_samples
from tests.tiny import tiny_model


def test_first_and_last_blocks_go_around_protected_ones():
    stack, samples = find_stack(tiny_model("llama", 6)), random_samples((4,))
    assert chosen(CRITERIA["first"], stack, samples, 3).removed == (0, 1, 2)
    assert chosen(CRITERIA["last"], stack, samples, 3).removed == (3, 4, 5)
    assert chosen(CRITERIA["first"], stack, samples, 2, protected=(0, 2)).removed == (1, 3)
    assert chosen(CRITERIA["last"], stack, samples, 2, protected=(-1, 3)).removed == (2, 4)
