"""Swaps against everything there is, and the criterion on a model."""

import itertools

import numpy as np
import pytest

from excise.choosing.criteria import CRITERIA
from excise.choosing.criteria.repaired_fisher import lowest_by_swaps
from excise.ising.energies.repaired_fisher import RepairedFisher
from excise.measuring.score import score
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import uneven_model
from tests.contexts import chosen, context_of
from tests.random_samples import random_samples


@pytest.mark.parametrize("seed", range(8))
def test_no_swap_lowers_what_it_finds(seed):
    energy = RepairedFisher.of(np.random.default_rng(seed).normal(size=(12, 7)))
    found = lowest_by_swaps(energy.energies, range(1, 7), 3)
    near = [c for c in itertools.combinations(range(1, 7), 3) if len(set(c) & set(found)) >= 2]
    assert energy.energies([found])[0] == min(energy.energies(near))


def test_swaps_leave_a_greedy_start_that_is_not_the_lowest():
    """The single that looks best belongs to no good pair."""
    values = {(0,): 0.0, (1,): 1.0, (2,): 1.0, (0, 1): 9.0, (0, 2): 8.0, (1, 2): 2.0}
    assert lowest_by_swaps(lambda removals: [values[r] for r in removals], range(3), 2) == (1, 2)


def test_it_removes_the_lowest_of_its_energy():
    stack, samples = find_stack(uneven_model("llama", 6)), random_samples(seed=2)
    gradients = score(context_of(stack), samples)
    energy = RepairedFisher.of(gradients.A, gradients.gate_blocks)
    selection = chosen(CRITERIA["repaired-fisher"], stack, samples, 2, protected=(0,))
    assert selection.removed == min(itertools.combinations(range(1, 6), 2), key=lambda r: energy.energies([r])[0])
    assert (selection.cost.forward_tokens, selection.cost.backward_tokens) == (samples.tokens, samples.tokens)
