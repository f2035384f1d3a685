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


# Model type, its layers, what stands in the file beside what transformers 5 writes, and what must stand there after
# blocks 1 and 2 are gone; None for what must not stand there.
AS_IT_STANDS = {
    "Granite hybrid in the words of 4.57": (
        "granitemoehybrid", 6, {"layer_types": ["mamba", "attention"] * 3},
        {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    ),
    "the other name of the list": (
        "granitemoehybrid", 6, {"layer_types": None, "layers_block_type": ["mamba", "attention"] * 3},
        {"layer_types": None, "layers_block_type": ["mamba", "attention", "mamba", "attention"]},
    ),
    "both names": (
        "granitemoehybrid", 6,
        {"layer_types": ["linear_attention", "attention"] * 3, "layers_block_type": ["mamba", "full_attention"] * 3},
        {
            "layer_types": ["linear_attention", "attention"] * 2,
            "layers_block_type": ["mamba", "full_attention"] * 2,
        },
    ),
    "Nemotron-H by its letters alone": (
        "nemotron_h", 6, {"layers_block_type": None, "hybrid_override_pattern": "MEM*-E"},
        {"layers_block_type": None, "layer_types": None, "hybrid_override_pattern": "M*-E"},
    ),
    "SmolLM3's rotary embeddings": (
        "smollm3", 6, {"no_rope_layers": [1, 1, 0] * 2}, {"no_rope_layers": [1, 1, 1, 0]},
    ),
    "a list left to a default": (
        "gpt_oss", 4, {"layer_types": None}, {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "experts in the words of 4.57": ("qwen3_moe", 6, {"num_experts": 4, "num_local_experts": None}, {
        "num_experts": 4, "num_local_experts": None, "mlp_only_layers": [2],
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", AS_IT_STANDS)
def test_a_list_is_cut_as_it_stands_in_the_file(case):
    model_type, layers, standing, expected = AS_IT_STANDS[case]
    config = tiny_config(model_type, layers)
    raw = {key: value for key, value in {**config.to_dict(), **standing}.items() if value is not None}
    read = type(config).from_dict(raw)
    after = pruned_raw_config(raw, read, ARCHITECTURES[model_type], [1, 2])
    assert {key: after.get(key) for key in expected} == expected
    for key in (key for key in ARCHITECTURES[model_type].per_block_keys if hasattr(read, key)):
        values = getattr(read, key)
        assert getattr(type(config).from_dict(after), key) == [values[i] for i in range(layers) if i not in (1, 2)]
