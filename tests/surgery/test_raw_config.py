"""config.json rewritten: what concerns blocks changes, under every spelling, and nothing else."""

from __future__ import annotations

import pytest

from excise.errors import CheckpointError
from excise.models.architectures import ARCHITECTURES
from excise.surgery.raw_config import pruned_raw_config
from tests.tiny import tiny_config


def prune(config, removed, **changes):
    raw = {**config.to_dict(), **changes}
    return raw, pruned_raw_config(raw, config, ARCHITECTURES[config.model_type], removed)


def test_only_what_concerns_blocks_changes():
    before, after = prune(tiny_config("llama"), [1, 4], mine=[1] * 6, quantization_config={"ignore": ["layers.1"]})
    assert after == {**before, "num_hidden_layers": 4}
    assert before["num_hidden_layers"] == 6


def test_the_text_model_inside_a_multimodal_one():
    config = tiny_config("gemma3")
    before, after = prune(config, [1, 4])
    types = config.text_config.layer_types
    text = {**before["text_config"], "num_hidden_layers": 4, "layer_types": [types[i] for i in (0, 2, 3, 5)]}
    assert after == {**before, "text_config": text}
    with pytest.raises(CheckpointError, match="text_config"):
        prune(config, [1, 4], text_config=None)


def test_a_spelling_that_transformers_does_not_write_is_cut_too():
    config = tiny_config("nemotron_h")
    _, after = prune(config, [1, 4], num_hidden_layers=6, hybrid_override_pattern="MEM*-E", num_nextn_predict_layers=1)
    assert (after["num_hidden_layers"], after["hybrid_override_pattern"]) == (4, "MM*E")
    assert after["num_nextn_predict_layers"] == 0
