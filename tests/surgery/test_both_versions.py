"""What comes from memory alone is spelt so that transformers 4.57 reads it, and version 5 reads the same.

That version 5 does so for all architectures is part of `test_on_disk.py`; version 4.57 reads in `test_portable.py`.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from excise.models.headers import read_checkpoint
from excise.models.stack import find_stack
from excise.surgery.checkpoint import write_pruned
from tests.tiny import tiny_model, tiny_tokenizer

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 7000.0}
# Model type, config of the model → what its config.json must and must not say.
SPELLINGS = {
    "a base": (
        "llama",
        {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
        {"rope_theta": 500_000.0, "torch_dtype": "float32"},
        {"rope_parameters", "rope_scaling", "dtype"},
    ),
    "a scaling": (
        "qwen3",
        {"rope_parameters": YARN},
        {"rope_theta": 7000.0, "rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"}},
        {"rope_parameters"},
    ),
    "a base for each type of attention": (
        "gemma3_text",
        {},
        {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        {"rope_parameters"},
    ),
    "a part of the dimensions": (
        "phi3",
        {"rope_parameters": {"rope_theta": 9000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_theta": 9000.0, "partial_rotary_factor": 0.5},
        {"rope_parameters"},
    ),
    "names of its own": (
        "gpt_neox",
        {"rope_parameters": {"rope_theta": 9000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 9000.0, "rotary_pct": 0.5},
        {"rope_parameters"},
    ),
    "kinds of blocks": ("granitemoehybrid", {}, {"layer_types": ["mamba", "mamba", "attention", "attention"]}, set()),
    "experts": ("qwen3_moe", {}, {"num_experts": 4}, {"rope_parameters"}),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spellings(kind, tmp_path):
    model_type, config, expected, absent = SPELLINGS[kind]
    model = tiny_model(model_type, **config)
    write_pruned(find_stack(model), [1, 4], tmp_path / "out", tokenizer=tiny_tokenizer())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written.get(key) for key in expected} == expected
    assert not absent & written.keys()
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_of_a_model_that_was_loaded_fused_are_written_one_by_one(model_type, tmp_path):
    """As from a GGUF file, whose loading leaves no conversion to take back."""
    stack = find_stack(tiny_model(model_type))
    stack.model._weight_conversions = []
    write_pruned(stack, [1, 4], tmp_path / "out")
    assert stack.model._weight_conversions == []
    names = [tensor.name for tensor in read_checkpoint(tmp_path / "out").tensors]
    assert sum(".experts.3." in name for name in names) == 4 * 3
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


def test_the_tokenizer_is_what_its_file_says(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    write_pruned(find_stack(tiny_model("llama")), [1], tmp_path / "out", tokenizer=tokenizer)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert not {"backend", "is_local", "extra_special_tokens"} & settings.keys()
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nGrüß Gott<|im_end|>"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.all_special_tokens == tokenizer.all_special_tokens
    assert reloaded.chat_template == tokenizer.chat_template


def test_the_stored_dtype_is_read_back(tmp_path):
    write_pruned(find_stack(tiny_model("llama")), [1], tmp_path / "out", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
