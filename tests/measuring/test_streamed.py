"""A model whose blocks wait on disk gives what it gives in memory, and reads each block once a sweep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from excise.measuring.measure import measure
from excise.measuring.score import score
from excise.measuring.sweep import sweeps
from excise.models.loading import load
from tests.contexts import context_of
from tests.quantised import quantise
from tests.random_samples import random_samples
from tests.tiny import MODEL_TYPES, STANDING, removable_pair, tiny_folder

SAMPLES = random_samples([11, 7, 13, 5, 9, 12])
BATCH_TOKENS = 24


PARAMS = [pytest.param(name, marks=() if name in STANDING else pytest.mark.slow) for name in MODEL_TYPES]


@pytest.fixture(scope="module", params=PARAMS)
def both(request, tmp_path_factory):
    """The same checkpoint, resident and streamed."""
    folder = str(tiny_folder(tmp_path_factory.mktemp("streamed") / "model", request.param, 6))
    return [load(folder, placement=placement, dtype="float32").stack for placement in ("resident", "streamed")]


def contexts(both, **fields):
    return [context_of(stack, batch_tokens=BATCH_TOKENS, **fields) for stack in both]


def test_no_weight_of_a_block_stays_in_memory(both):
    resident, streamed = both
    assert all(p.is_meta for block in streamed.blocks for p in block.module.parameters())
    assert not sweeps(resident)
    assert sweeps(streamed) == (not streamed.shares_kv)
    # The model as a whole still runs, each block bringing its own weights.
    ids = torch.arange(9).unsqueeze(0)
    torch.testing.assert_close(streamed.hidden(ids), resident.hidden(ids), rtol=0, atol=0)


def test_gemma_4_without_shared_keys_and_values_is_swept_and_shares_what_candidates_share(tmp_path):
    folder = str(tiny_folder(tmp_path / "model", "gemma4_text", 6, num_kv_shared_layers=0))
    both = [load(folder, placement=placement, dtype="float32").stack for placement in ("resident", "streamed")]
    assert sweeps(both[1])
    resident, streamed = (measure(c, SAMPLES, [(2,), (4,), (1, 4)]) for c in contexts(both))
    np.testing.assert_allclose(streamed.sums, resident.sums, rtol=1e-6)
    assert resident.forward_tokens < SAMPLES.tokens * (5 + 5 + 4) / 6


@pytest.mark.parametrize("statistic", ["loss", "divergence", "rejection"])
def test_losses_are_the_same(both, statistic):
    pair = [i for i in removable_pair(both[0].config.model_type) if i not in both[0].fixed]
    removals = [(), pair, pair[:1], pair[1:]]
    resident, streamed = (measure(c, SAMPLES, removals, statistic=statistic) for c in contexts(both))
    np.testing.assert_allclose(streamed.sums, resident.sums, rtol=1e-6, atol=1e-6)
    assert streamed.removals == resident.removals


def test_losses_without_sublayers_are_the_same(both):
    gates = [(0,), (1, 3), (len(both[0].sublayers) - 1,)]
    resident, streamed = (measure(c, SAMPLES, gates, sublayers=True) for c in contexts(both))
    np.testing.assert_allclose(streamed.sums, resident.sums, rtol=1e-6)


def test_gradients_are_the_same(both):
    resident, streamed = (score(c, SAMPLES) for c in contexts(both))
    np.testing.assert_allclose(streamed.losses, resident.losses, rtol=1e-6)
    np.testing.assert_allclose(streamed.A, resident.A, rtol=1e-6, atol=1e-6 * np.abs(resident.A).max())


@pytest.mark.parametrize("form", ["modelopt", "fp8", "compressed-tensors"])
def test_float8_weights_are_streamed_dequantised(form, tmp_path):
    folder = str(quantise(tiny_folder(tmp_path / form, "llama", 4), form))
    resident, streamed = (load(folder, placement=placement).stack for placement in ("resident", "streamed"))
    assert sweeps(streamed)
    ids = torch.arange(9).unsqueeze(0)
    torch.testing.assert_close(streamed.hidden(ids), resident.hidden(ids), rtol=0, atol=0)
