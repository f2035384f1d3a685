"""Shapley values against their definition over subsets, and the whole against naive perplexities."""

import itertools
import math

import numpy as np
import pytest
import torch

from excise.choosing.criteria import CRITERIA
from excise.choosing.criteria.cooperative_game import (
    MEASURED,
    ORDERS,
    coalitions,
    shapley_values,
    stratified,
    surrogate,
)  # fmt: skip
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import FLOAT32_NORM, perplexity, uneven_model, without
from tests.contexts import chosen
from tests.random_samples import random_samples, traces

PLAYERS = 4


def test_all_orders_give_the_shapley_values():
    worth = {subset: math.sin(7.0 * hash(subset)) for r in range(5) for subset in itertools.combinations(range(4), r)}

    def value(joined):
        return torch.tensor([worth[tuple(np.flatnonzero(row))] for row in joined.numpy()], dtype=torch.float64)

    expected = []
    for player in range(PLAYERS):
        others = [i for i in range(PLAYERS) if i != player]
        terms = []
        for r in range(PLAYERS):
            weight = math.factorial(r) * math.factorial(PLAYERS - 1 - r) / math.factorial(PLAYERS)
            for subset in itertools.combinations(others, r):
                terms.append(weight * (worth[tuple(sorted((*subset, player)))] - worth[subset]))
        expected.append(math.fsum(terms))
    orders = torch.tensor(list(itertools.permutations(range(PLAYERS))))
    np.testing.assert_allclose(shapley_values(value, orders), expected, atol=1e-12)


def test_removals_of_every_size_are_drawn():
    drawn = stratified(range(2, 12), 9, seed=1)
    sizes = [len(removed) for removed in drawn]
    assert set(sizes) == set(range(1, 10))
    assert all(set(removed) <= set(range(2, 12)) and removed == tuple(sorted(removed)) for removed in drawn)
    # Of ten single players fourteen draws give each but once.
    assert len(set(drawn)) == len(drawn) <= MEASURED


def test_the_surrogate_learns_what_blocks_do_together():
    kept = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=torch.float64)
    values = kept[:, 0] * kept[:, 1] * 0.6 + kept[:, 2] * 0.4
    learned = surrogate(kept[::2], values[::2], 0)(kept[1::2])
    assert (learned - values[1::2]).square().mean() < 0.1 * values.var()


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_values_are_perplexities_of_models_cut_by_hand(model_type):
    model, samples, players = uneven_model(model_type, 5), random_samples((9, 5, 14), seed=5), [1, 2, 3, 4]
    removals = [(), *stratified(players, 4, 3)]
    intact = perplexity(model, samples)
    values = torch.tensor([intact / perplexity(without(model, removed), samples) for removed in removals])
    generator = torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(4, generator=generator) for _ in range(ORDERS)])
    expected = shapley_values(surrogate(coalitions(removals, players), values, 3), orders)
    before = traces(model)
    selection = chosen(CRITERIA["cooperative-game"], find_stack(model), samples, 2, protected=(0,), seed=3)
    assert traces(model) == before
    assert selection.scores[0] is None
    # Three hundred steps of the optimiser magnify roundings of the measured values.
    np.testing.assert_allclose(selection.scores[1:], expected, atol=100 * FLOAT32_NORM)
    assert selection.removed == tuple(sorted(1 + int(i) for i in np.argsort(expected)[:2]))
