"""The config of a pruned model, field by field, against values worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import ARCHITECTURES
from excise.surgery.config import kept_blocks, pruned_config, quantisation
from tests.tiny import MODEL_TYPES, tiny_config


def prune(config, removed):
    return pruned_config(config, ARCHITECTURES[config.model_type], removed)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_block_count_shrinks_and_the_rest_stays(model_type):
    original = tiny_config(model_type)
    before = original.to_dict()
    after = prune(original, [1, 4]).to_dict()
    assert original.to_dict() == before, "the original's config changed"
    record = ARCHITECTURES[model_type]
    in_step = {"num_hidden_layers", "n_layer", *record.per_block_keys, *record.positions, *record.index_lists}
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= in_step
    assert after["n_layer" if model_type == "gpt2" else "num_hidden_layers"] == 4


def test_the_alias_of_the_block_count_follows():
    assert prune(tiny_config("gpt2"), [0]).n_layer == 5


def test_layer_types_are_cut():
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = tiny_config("gemma2", layers=4, layer_types=types)
    assert prune(config, [0, 3]).layer_types == ["full_attention", "sliding_attention"]


def test_no_rope_layers_are_cut():
    config = tiny_config("smollm3", layers=6, no_rope_layers=[1, 1, 0, 1, 1, 0])
    assert prune(config, [0, 2]).no_rope_layers == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("position", "removed", "expected"),
    [(3, [], 3), (3, [0, 4], 2), (3, [3, 4], 3), (3, [0, 1, 2], 0), (6, [0, 5], 4), (9, [0, 5], 7), (0, [0], 0)],
)
def test_positions_are_recounted(position, removed, expected):
    config = tiny_config("qwen2", layers=6, max_window_layers=position)
    assert prune(config, removed).max_window_layers == expected


@pytest.mark.parametrize(
    ("indices", "removed", "expected"),
    [([1, 4], [1], [3]), ([1, 4], [0, 2], [0, 2]), ([1, 4], [5], [1, 4]), ([1], [1], []), ([], [3], [])],
)
def test_lists_of_indices_are_renumbered(indices, removed, expected):
    config = tiny_config("qwen3_moe", layers=6, mlp_only_layers=indices)
    assert prune(config, removed).mlp_only_layers == expected


def test_a_list_as_long_as_the_stack_that_is_not_per_block_is_left_alone():
    config = tiny_config("llama", layers=6)
    config.labels = ["a", "b", "c", "d", "e", "f"]
    config.hidden_act_name = "silu12"
    after = prune(config, [0])
    assert (after.labels, after.hidden_act_name) == (config.labels, "silu12")


def test_a_per_block_list_of_another_length_is_refused():
    config = tiny_config("llama", layers=6)
    config.per_block = [1, 2, 3]
    record = dataclasses.replace(ARCHITECTURES["llama"], per_block_keys=("per_block",))
    with pytest.raises(ArchitectureError, match="per_block has 3 entries for 6 blocks"):
        pruned_config(config, record, [0])


def test_gguf_marks_are_dropped_and_others_kept():
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gguf"}
    assert quantisation(config) == "gguf"
    assert not hasattr(prune(config, [0]), "quantization_config")
    assert quantisation(config) == "gguf", "the original's marks were dropped"
    config.quantization_config = {"quant_method": "fp8"}
    assert quantisation(prune(config, [0])) == "fp8"


@pytest.mark.parametrize("removed", [[0, 0], [6], [-1], [0, 1, 2, 3, 4, 5]])
def test_removed_must_fit_the_stack(removed):
    with pytest.raises(InputError):
        kept_blocks(6, removed)
