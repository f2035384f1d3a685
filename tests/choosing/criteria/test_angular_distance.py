"""Angular distance against its formula at the last token of unpadded samples, window by window."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from excise.choosing.criteria import CRITERIA
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import FLOAT32_NORM, MODELS, uneven_model
from tests.contexts import chosen
from tests.random_samples import random_samples, traces

LAYERS = 6
SAMPLES = random_samples((9, 5, 14, 2), seed=5)


def naive_distance(model, low, high):
    """Mean angle between the streams before block `low` and before block `high` (after the last, where high = N)."""
    angles = []
    for sample in SAMPLES:
        seen = []
        handles = [
            module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            for module in (*model.model.layers, model.model.norm)
        ]
        with torch.no_grad():
            model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False)
        for handle in handles:
            handle.remove()
        a, b = seen[low][0, -1].tolist(), seen[high][0, -1].tolist()
        cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        angles.append(math.acos(cosine) / math.pi)
    return np.mean(angles)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_the_window_of_smallest_distance_goes(model_type, budget):
    model = uneven_model(model_type, LAYERS)
    distances = [naive_distance(model, low, low + budget) for low in range(LAYERS - budget + 1)]
    stack = find_stack(model)
    before = traces(model)
    selection = chosen(CRITERIA["angular-distance"], stack, SAMPLES, budget)
    assert traces(model) == before
    np.testing.assert_allclose(selection.scores[: len(distances)], distances, rtol=FLOAT32_NORM)
    assert selection.scores[len(distances) :] == (None,) * (budget - 1)
    low = int(np.argmin(distances))
    assert selection.removed == tuple(range(low, low + budget))
    assert selection.cost.forward_tokens == SAMPLES.tokens
    assert selection.note == ""


def test_a_window_reaches_over_protected_blocks_and_says_so():
    model = uneven_model("llama", LAYERS)
    windows = {(0, 2): (0, 3), (2, 3): (2, 4), (3, 5): (3, 6)}
    distances = {window: naive_distance(model, *ends) for window, ends in windows.items()}
    selection = chosen(CRITERIA["angular-distance"], find_stack(model), SAMPLES, 2, protected=(1, 4))
    assert selection.removed == min(distances, key=distances.get)
    selection = chosen(CRITERIA["angular-distance"], find_stack(model), SAMPLES, 3, protected=(1, 4))
    assert selection.removed in {(0, 2, 3), (2, 3, 5)}
    assert "protected" in selection.note
