"""The config of a pruned model, field by field, against values worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import ARCHITECTURES
from excise.surgery.config import kept_blocks, pruned_config, quantisation, write_derived
from tests.tiny import MODEL_TYPES, removable_pair, tiny_config


def prune(config, removed):
    return pruned_config(config, ARCHITECTURES[config.model_type], removed)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_block_count_shrinks_and_the_rest_stays(model_type):
    original = tiny_config(model_type)
    before = original.to_dict()
    pruned = prune(original, removable_pair(model_type))
    assert original.to_dict() == before, "the original's config changed"
    record, text = ARCHITECTURES[model_type], pruned.get_text_config(decoder=True)
    assert text.num_hidden_layers == 4
    named = {"num_hidden_layers", "n_layer", "per_layer_config", *record.per_block_keys, *record.positions}
    named |= {*record.index_lists, *record.top_counts, *record.extra_blocks, "num_mtp_layers"}
    named |= {key for period in record.periods for key in (period.period, period.offset)}
    for place, values in (("", pruned.to_dict()), ("text_config", text.to_dict())):
        was = before.get("text_config", before) if place else {k: v for k, v in before.items() if k != "text_config"}
        assert {key for key in was if was[key] != values[key]} <= named


def test_the_text_config_inside_a_multimodal_one_is_cut():
    pruned = prune(tiny_config("gemma3", vocab_size=300), [0, 5])
    assert pruned.text_config.num_hidden_layers == len(pruned.text_config.layer_types) == 4
    assert pruned.vision_config.num_hidden_layers == 1


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize(("removed", "expected"), [([0], 1), ([2, 5], 2), ([0, 1, 3], 0)])
def test_dense_blocks_at_the_bottom_are_recounted(model_type, removed, expected):
    assert prune(tiny_config(model_type), removed).first_k_dense_replace == expected


def test_blocks_for_multi_token_prediction_are_gone():
    """Transformers does not load them, so a pruned checkpoint has none."""
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1)
    assert config.num_nextn_predict_layers == 1
    assert prune(config, [0]).num_nextn_predict_layers == 0


def test_nemotron_h_keeps_its_pattern_in_step(tmp_path):
    config = tiny_config("nemotron_h")
    assert config.hybrid_override_pattern == "MEM*-E"
    pruned = prune(config, [1, 5])
    assert pruned.layers_block_type == ["linear_attention", "linear_attention", "full_attention", "mlp"]
    pruned.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in written
    write_derived(tmp_path, pruned, ARCHITECTURES["nemotron_h"])
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["num_hidden_layers"], written["hybrid_override_pattern"]) == (4, "MM*-")
    assert type(config).from_pretrained(tmp_path).to_dict() == pruned.to_dict()


@pytest.mark.parametrize(
    ("removed", "attention", "experts"),
    [
        ([0, 1], (4, 2), (2, 1)),  # one attention left, at 2 of 4
        ([2, 3, 4, 5], (3, 1), (2, 1)),
        ([0, 2, 4], (3, 0), (1, 0)),  # nothing but experts
    ],
)
def test_periods_are_found_anew(removed, attention, experts):
    pruned = prune(tiny_config("jamba"), removed)
    assert (pruned.attn_layer_period, pruned.attn_layer_offset) == attention
    assert (pruned.expert_layer_period, pruned.expert_layer_offset) == experts


def test_a_removal_that_no_period_describes_is_refused():
    with pytest.raises(
        ArchitectureError, match=r"expert_layer_offset, and no such pair puts them at \[1, 2, 4\] of the 5"
    ):
        prune(tiny_config("jamba"), [2])


@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_next", "granitemoehybrid", "lfm2", "jamba", "qwen3_5"])
def test_a_hybrid_without_any_attention_is_refused(model_type):
    """As stock transformers cannot generate with a cache from one."""
    config = tiny_config(model_type)
    types = config.get_text_config(decoder=True).layer_types
    attention = [i for i, entry in enumerate(types) if entry == "full_attention"]
    with pytest.raises(ArchitectureError, match=r"one of the full_attention blocks .* must stay"):
        prune(config, attention)


def test_shared_keys_and_values_stay_those_of_the_same_block():
    """Of six blocks, sliding and full in turn, 4 uses the keys and values of 2, and 5 those of 3."""
    config = tiny_config("gemma4_text")
    pruned = prune(config, [0, 4])
    assert (pruned.num_kv_shared_layers, pruned.layer_types) == (1, [config.layer_types[i] for i in (1, 2, 3, 5)])
    assert list(pruned.to_dict()["per_layer_config"]) == ["0", "2", "3"], "full-attention blocks have wider heads"
    with pytest.raises(ArchitectureError, match="block 2 cannot be removed while block 4 stays"):
        prune(config, [2])


def test_a_last_block_that_transformers_would_change_is_refused():
    config = tiny_config("gemma4_text", num_kv_shared_layers=0)
    with pytest.raises(ArchitectureError, match=r"would read layer_types of the pruned gemma4_text as .*choose other"):
        prune(config, [5])


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
