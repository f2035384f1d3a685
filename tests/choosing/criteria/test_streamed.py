"""Criteria that look at block inputs and outputs give on a model that waits on disk what they give in memory."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.utils.offload import OffloadedWeightsLoader

from excise.choosing.brief import Brief
from excise.choosing.criteria import CRITERIA, SUBLAYER_CRITERIA
from excise.errors import ArchitectureError
from excise.models.loading import load
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import MODEL_TYPES, tiny_folder

SAMPLES = random_samples([11, 7, 5])
WATCHING = {
    # Name → most reads of a block where two are removed; those of gemma4_text, which is not swept, aside.
    "angular-distance": 1,
    "block-influence-iterative": 2,
    "prune-and-comp": 4,
    "llm-drop-joint": 1,
}


PARAMS = [pytest.param(name, marks=() if name in ("llama", "nemotron_h") else pytest.mark.slow) for name in MODEL_TYPES]


@pytest.fixture(scope="module", params=PARAMS)
def both(request, tmp_path_factory):
    """The same checkpoint, resident and streamed."""
    folder = str(tiny_folder(tmp_path_factory.mktemp("streamed") / "model", request.param, 5))
    return [load(folder, placement=placement, dtype="float32").stack for placement in ("resident", "streamed")]


@pytest.fixture
def reads(monkeypatch):
    """How often each weight was brought in."""
    counted: dict[str, int] = {}
    bring = OffloadedWeightsLoader.__getitem__

    def read(self, key):
        counted[key] = counted.get(key, 0) + 1
        return bring(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", read)
    return counted


def answer(criterion, stack):
    """What a criterion proposes, or why it refuses the model."""
    free = [block.index for block in stack.blocks if block.index not in stack.fixed]
    try:
        (proposal,) = criterion(context_of(stack, batch_tokens=16), SAMPLES, Brief.on(stack, min(2, len(free))))
    except ArchitectureError as refusal:
        return str(refusal), []
    return (proposal.removed, proposal.order, proposal.sublayers), proposal.scores


@pytest.mark.parametrize("name", WATCHING)
def test_criteria_say_the_same_and_read_each_block_once_a_pass(both, name, reads):
    criterion = {**CRITERIA, **SUBLAYER_CRITERIA}[name]
    (resident, expected), (streamed, scores) = (answer(criterion, stack) for stack in both)
    assert streamed == resident
    np.testing.assert_allclose(np.array(scores, float), np.array(expected, float), rtol=1e-6, atol=1e-7)
    if not both[0].shares_kv:
        assert 0 < max(reads.values()) <= WATCHING[name]
