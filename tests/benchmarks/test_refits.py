"""Refits against the product's repair, and against least squares on stacked rows."""

import numpy as np
import pytest
import torch
from benchmarks.patches import linear_patch, patched, scalar
from benchmarks.refits import Refitting, Step

from excise.models.stack import bypass, find_stack
from excise.repair.repair import Folding, repair
from excise.repair.streams import recorded_streams
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

REMOVED, BELOW = (2, 3, 5), (Step((1,), 3), Step((4,), 5))
SAMPLES = random_samples((11, 7, 16, 9, 13, 5, 16, 12, 8, 10))


@pytest.fixture
def stack():
    return find_stack(tiny_model("llama", 7, dtype=torch.float64))


@pytest.mark.parametrize("features", ["input", "output"])
def test_matrices_below_the_cuts_are_refitted_as_repair_refits_them(stack, features):
    steps = [Step(step.blocks, step.target, None, features) for step in BELOW]
    before = traces(stack.model)
    found = Refitting(context_of(stack), REMOVED, SAMPLES).weights(steps)
    assert traces(stack.model) == before
    expected = repair(context_of(stack), REMOVED, SAMPLES, folding=Folding(features=features, above=False)).weights
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)


def test_a_gain_scales_rows_of_the_matrix(stack):
    weight = stack.model.model.layers[1].mlp.down_proj.weight
    found = Refitting(context_of(stack), REMOVED, SAMPLES).weights([Step((1,), 3, None, "gain")])
    ratio = found["model.layers.1.mlp.down_proj.weight"] / weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio[:, 0].std() > 1e-3


@pytest.mark.parametrize("step", [Step((0, 1), 3), Step((4,), 4), Step((1,), 3, "attention"), Step((6,), 6)])
def test_what_is_missing_of_the_stream_gets_less(stack, step):
    refitting = Refitting(context_of(stack), REMOVED, SAMPLES)
    if step.target == 4:  # the block above a cut, which is also below the next
        assert 4 in refitting.targets[0]
    at = max(step.blocks)

    def missing():
        error = 0.0
        for batch, target in zip(refitting.batches, refitting.targets, strict=True):
            with torch.no_grad(), bypass(stack, REMOVED), recorded_streams(stack, [at]) as streams:
                stack.hidden(batch.input_ids)
            error += float((streams[at] - target[step.target])[batch.real].square().sum())
        return error

    before = missing()
    for name, weight in refitting.weights([step]).items():
        stack.model.get_parameter(name).data = weight
    assert missing() < before


def test_maps_are_fitted_on_the_stream_as_lower_maps_made_it(stack):
    refitting = Refitting(context_of(stack), REMOVED, SAMPLES)
    maps = refitting.maps(scalar)
    assert maps.keys() == {2, 5}
    streams = {}
    for cut, kept, below in ((2, 1, {}), (5, 4, {2: maps[2]})):
        rows = []
        for sample in SAMPLES:
            ids = torch.from_numpy(sample.input_ids)[None]
            with torch.no_grad(), recorded_streams(stack, [cut + 1 if cut == 2 else cut]) as original:
                stack.hidden(ids)
            with torch.no_grad(), patched(stack, REMOVED, below), recorded_streams(stack, [kept]) as student:
                stack.hidden(ids)
            rows.append((student[kept][0], next(iter(original.values()))[0]))
        streams[cut] = [torch.cat(side) for side in zip(*rows, strict=True)]
        np.testing.assert_allclose(maps[cut], scalar(*streams[cut]), rtol=1e-8)
    assert not torch.allclose(refitting.maps(linear_patch)[2], maps[2])
