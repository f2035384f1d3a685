"""SLEB against a naive greedy descent over models cut by hand."""

from __future__ import annotations

import numpy as np
import pytest

from excise.choosing.criteria import CRITERIA
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import FLOAT32_NORM, MODELS, token_losses, uneven_model, without
from tests.contexts import chosen
from tests.random_samples import random_samples, traces

LAYERS = 6
SAMPLES = random_samples((9, 5, 14), seed=5)


def naive_score(model):
    return sum(np.mean(token_losses(model, sample)) * len(sample.input_ids) for sample in SAMPLES)


@pytest.mark.parametrize("model_type", MODELS)
def test_greedy_descent(model_type):
    model = uneven_model(model_type, LAYERS)
    alive, order, intact_scores = list(range(LAYERS)), [], None
    for _round in range(3):
        scores = {i: naive_score(without(model, [*order, i])) for i in alive[1:-1]}
        intact_scores = intact_scores or scores
        order.append(min(scores, key=scores.get))
        alive.remove(order[-1])
    before = traces(model)
    selection = chosen(CRITERIA["sleb"], find_stack(model), SAMPLES, 3)
    assert traces(model) == before
    assert selection.order == tuple(order)
    assert selection.removed == tuple(sorted(order))
    assert (selection.scores[0], selection.scores[-1]) == (None, None)
    np.testing.assert_allclose(selection.scores[1:-1], list(intact_scores.values()), rtol=FLOAT32_NORM)
    assert selection.note == ""


def test_shared_prefixes_make_it_cheaper_than_its_rounds():
    selection = chosen(CRITERIA["sleb"], find_stack(uneven_model("llama", LAYERS)), SAMPLES, 2)
    one_by_one = SAMPLES.tokens * (4 * 5 + 3 * 4) / LAYERS
    assert SAMPLES.tokens < selection.cost.forward_tokens < 0.8 * one_by_one


def test_first_and_last_go_only_when_nothing_else_is_left():
    stack = find_stack(uneven_model("llama", LAYERS))
    assert chosen(CRITERIA["sleb"], stack, SAMPLES, 4).removed == (1, 2, 3, 4)
    selection = chosen(CRITERIA["sleb"], stack, SAMPLES, 3, protected=(1, 2))
    assert set(selection.order[:2]) == {3, 4}
    assert selection.order[2] in {0, 5}
    assert f"[{selection.order[2]}]" in selection.note
