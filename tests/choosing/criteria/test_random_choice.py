from __future__ import annotations

import collections

from excise.choosing.criteria.random_choice import random_choice
from excise.models.stack import find_stack
from tests.contexts import chosen
from tests.random_samples import random_samples
from tests.tiny import tiny_model


def test_a_seed_fixes_the_choice_and_seeds_differ():
    stack, samples = find_stack(tiny_model("llama", 12)), random_samples((4,))
    choices = [chosen(random_choice, stack, samples, 4, seed=seed).removed for seed in range(50)]
    assert choices == [chosen(random_choice, stack, samples, 4, seed=seed).removed for seed in range(50)]
    assert len(set(choices)) > 40


def test_every_block_that_may_go_goes_equally_often():
    stack, samples = find_stack(tiny_model("llama", 6)), random_samples((4,))
    counts = collections.Counter(
        block
        for seed in range(400)
        for block in chosen(random_choice, stack, samples, 2, protected=(0,), seed=seed).removed
    )
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(110 <= count <= 210 for count in counts.values())  # 160 ± 9.8 expected; five standard deviations
