"""Sliding window merging against a naive transcription that really pops blocks, and its search for a threshold."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from excise.choosing.criteria import CRITERIA
from excise.choosing.criteria.sliding_window import Similarity, sweep
from excise.errors import ArchitectureError
from excise.models.stack import find_stack
from excise.progress import Progress
from excise.surgery.merge import MATRICES, runs_of
from tests.choosing.criteria.naive import uneven_model
from tests.contexts import Shown, chosen, context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

LAYERS = 9
SAMPLES = random_samples((9, 5, 14), seed=5)


@torch.no_grad()
def naive_merge(model, low, high, rule):
    """Copy of the current model in which layers low..high (its own numbering) are one."""
    model = copy.deepcopy(model)
    layers = model.model.layers
    for name in MATRICES:
        target = layers[low].get_submodule(name).weight
        original = target.clone()
        for k in range(low + 1, high + 1):
            other = layers[k].get_submodule(name).weight
            target += other - (original if rule == "figure" else target.clone())
    model.model.layers = torch.nn.ModuleList([layer for i, layer in enumerate(layers) if not low < i <= high])
    model.config.num_hidden_layers = len(model.model.layers)
    return model


@torch.no_grad()
def naive_hidden(model):
    states = []
    for sample in SAMPLES:
        ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
        states.append(model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten().numpy())
    return states


def naive_similarity(reference, model):
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(reference, naive_hidden(model), strict=True)]
    return float(np.mean(cosines))


def naive_sliding_window(model, threshold, rule):
    """Numbers of the blocks that are left, and the similarities met on the way."""
    reference, current = naive_hidden(model), copy.deepcopy(model)
    left, met = list(range(LAYERS)), []
    high = LAYERS - 2
    low = high - 1
    while low >= 0:
        met.append(naive_similarity(reference, naive_merge(current, low, high, rule)))
        if met[-1] > threshold:
            low -= 1
        elif low + 1 != high:
            current = naive_merge(current, low + 1, high, rule)
            del left[low + 2 : high + 1]
            high = low
            low = high - 1
        else:
            high -= 1
            low -= 1
    return left, met


@pytest.fixture(scope="module")
def model():
    return uneven_model("llama", LAYERS, seed=1, spread=1.5)


@pytest.mark.parametrize("rule", ["figure", "code"])
def test_sweeps_equal_the_transcription(model, rule):
    stack = find_stack(model)
    before, weights = traces(model), copy.deepcopy(model.state_dict())
    similarity, outcomes = Similarity(context_of(stack), SAMPLES, rule), set()
    for threshold in (1.0, 0.9, 0.8, 0.65, 0.5, 0.3, 0.0, -1.0):
        asked = []

        def recorded(removed, asked=asked):
            asked.append(similarity(removed))
            return asked[-1]

        left, met = naive_sliding_window(model, threshold, rule)
        found = sweep(recorded, LAYERS, threshold)
        assert found.removed == tuple(i for i in range(LAYERS) if i not in left)
        assert asked == pytest.approx(met, rel=1e-4, abs=1e-5)
        outcomes.add(found.removed)
    assert len(outcomes) >= 4  # the thresholds tell something
    assert sweep(similarity, LAYERS, -1.0).left_open == LAYERS - 2
    assert traces(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rule", ["figure", "code"])
def test_the_threshold_found_leads_there_and_the_rest_is_completed(model, rule):
    stack, found = find_stack(model), 0
    for budget in range(1, 7):
        selection = chosen(CRITERIA[f"swm-{rule}"], stack, SAMPLES, budget)
        threshold = float(selection.note.split()[1])
        assert selection.merge == rule
        assert len(selection.removed) == budget
        left, _ = naive_sliding_window(model, threshold, rule)
        by_threshold = {i for i in range(LAYERS) if i not in left}
        assert by_threshold <= set(selection.removed)
        assert ("merged one at a time" in selection.note) == (len(by_threshold) < budget)
        if by_threshold == set(selection.removed):
            found += 1
        else:
            assert f"removes {len(by_threshold)} blocks" in selection.note
    assert found >= 2


def test_completion_takes_the_merge_that_leaves_the_output_most_alike(model):
    # A sweep never merges block 1 away.
    selection = chosen(CRITERIA["swm-code"], find_stack(model), SAMPLES, LAYERS - 2)
    assert "merged one at a time" in selection.note
    assert selection.removed == tuple(range(1, LAYERS - 1))


def test_protected_blocks_are_not_merged_away():
    def always(removed):
        return 1.0

    assert sweep(always, 10, 0.5).removed == ()
    assert sweep(always, 10, 0.5, protected=(5,)).removed == (6, 7, 8)
    assert sweep(always, 10, 0.5, protected=(8, 3)).removed == (4, 5, 6, 7)
    assert [run.kept for run in runs_of(sweep(always, 10, 0.5, protected=(8, 3)).removed)] == [3]


@pytest.mark.parametrize("method", ["swm-figure", "swm-code"])
def test_mixtures_of_experts_are_refused(method):
    with pytest.raises(ArchitectureError, match=r"dense pre-norm blocks.*Drop the blocks instead"):
        chosen(CRITERIA[method], find_stack(tiny_model("mixtral", 6)), SAMPLES, 2)


def test_cost_counts_each_distinct_trial_once(model):
    shown = Shown()
    similarity = Similarity(context_of(find_stack(model), progress=Progress(shown)), SAMPLES, "code")
    for removed in ((3,), (3, 4), (3,), ()):
        similarity(removed)
    assert sum(shown.done) == 4 * SAMPLES.tokens
    assert similarity.forward_tokens == pytest.approx(SAMPLES.tokens * (1 + 8 / 9 + 7 / 9 + 1))
    assert similarity(()) == pytest.approx(1, rel=1e-12)
