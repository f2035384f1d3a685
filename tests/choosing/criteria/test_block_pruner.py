"""BlockPruner against a naive greedy descent over models whose sublayers write zeros."""

from __future__ import annotations

import numpy as np
import pytest

from excise.choosing.criteria import SUBLAYER_CRITERIA
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import FLOAT32_NORM, MODELS, perplexity, silenced, uneven_model
from tests.contexts import chosen
from tests.random_samples import random_samples, traces

LAYERS = 5
SAMPLES = random_samples((9, 5, 7), seed=5)


@pytest.mark.parametrize("model_type", MODELS)
def test_greedy_descent_over_sublayers(model_type):
    model = uneven_model(model_type, LAYERS, spread=1.5)
    order, intact_scores = [], None
    for _round in range(4):
        scores = {g: perplexity(silenced(model, [*order, g]), SAMPLES) for g in range(2 * LAYERS) if g not in order}
        intact_scores = intact_scores or scores
        order.append(min(scores, key=scores.get))
    before = traces(model)
    selection = chosen(SUBLAYER_CRITERIA["block-pruner"], find_stack(model), SAMPLES, 2)
    assert traces(model) == before
    assert selection.order == tuple(order)
    assert selection.sublayers == tuple(sorted(order))
    assert selection.removed == tuple(b for b in range(LAYERS) if {2 * b, 2 * b + 1} <= set(order))
    np.testing.assert_allclose(selection.scores, list(intact_scores.values()), rtol=FLOAT32_NORM)
    assert 0 < selection.cost.forward_tokens < SAMPLES.tokens * (10 + 9 + 8 + 7)


def test_protected_blocks_keep_both_sublayers():
    selection = chosen(
        SUBLAYER_CRITERIA["block-pruner"], find_stack(uneven_model("llama", LAYERS)), SAMPLES, 2, protected=(0, 1, -1)
    )
    assert selection.sublayers == (4, 5, 6, 7)
    assert selection.removed == (2, 3)
    assert selection.scores[:4] == (None,) * 4
