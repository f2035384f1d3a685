"""What a repair is folded into, in every architecture; docs/healing.md has the table in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excise.errors import ArchitectureError
from excise.models.loading import Loaded
from excise.models.stack import SCALE, bypass, find_stack
from excise.repair.cuts import folds_of
from excise.repair.folds import Gain, Projection
from excise.repair.measured import repairable_folds
from excise.repair.repair import Folding, repair, repaired
from excise.repair.streams import recorded_streams
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import MODEL_TYPES, removable_pair, tiny_model

SAMPLES, HELD_OUT = random_samples([16] * 12), random_samples([16] * 6, seed=1)

DOWN = {"mlp.down_proj"}
SHARED = {"mlp.shared_experts.down_proj"}
FEED_FORWARD_NORM = {"post_feedforward_layernorm"}
INTO = {
    "deepseek_v3": DOWN | SHARED,
    "falcon_h1": {"feed_forward.down_proj"},
    "gemma2": FEED_FORWARD_NORM,
    "gemma3": FEED_FORWARD_NORM,
    "gemma3_text": FEED_FORWARD_NORM,
    "glm4_moe": DOWN | SHARED,
    "gpt2": {"mlp.c_proj"},
    "gpt_neox": {"mlp.dense_4h_to_h"},
    "gpt_oss": {"mlp"},
    "granite": DOWN,
    "granitemoehybrid": {"shared_mlp.output_linear"},
    "jamba": {"feed_forward", "feed_forward.down_proj"},
    "lfm2": {"feed_forward.w2"},
    "llama": DOWN,
    "mamba2": {"mixer.out_proj"},
    "ministral3": DOWN,
    "mistral": DOWN,
    "mixtral": {"mlp"},
    "nemotron_h": {"mixer.out_proj", "mixer.shared_experts.down_proj", "mixer.o_proj", "mixer.down_proj"},
    "olmo2": FEED_FORWARD_NORM,
    "olmoe": {"mlp"},
    "opt": {"fc2"},
    "phi3": DOWN,
    "qwen2": DOWN,
    "qwen3": DOWN,
    "qwen3_5": DOWN,
    "qwen3_5_text": DOWN,
    "qwen3_moe": {"mlp"} | DOWN,
    "qwen3_next": DOWN | {"mlp.shared_expert.down_proj"},
    "smollm3": DOWN,
}
LEFT_OUT = dict.fromkeys(("gemma4", "gemma4_text"), "use keys and values of blocks below them")
UNSHARED = {"num_kv_shared_layers": 0}


def path_of(stack, fold):
    names = {module: name for name, module in stack.blocks[fold.sublayer.block].module.named_modules()}
    return names[fold.module]


def streams(stack, removed, after, samples):
    """The stream [tokens, width] after a block, without some."""
    found = []
    for sample in samples:
        with torch.no_grad(), bypass(stack, removed), recorded_streams(stack, [after]) as kept:
            stack.hidden(torch.from_numpy(sample.input_ids).unsqueeze(0))
        found.append(kept[after][0])
    return torch.cat(found).double()


def residuals(stack, block, samples, **folding):
    """Squared distance from the original's stream after a block of that without it, and of that repaired below it."""
    target = streams(stack, (), block, samples)
    before = streams(stack, [block], block - 1, samples)
    fitted = repair(context_of(stack), [block], SAMPLES, folding=Folding(above=False, **folding))
    with repaired(stack, fitted):
        after = streams(stack, [block], block - 1, samples)
    return [float((stream - target).square().sum()) for stream in (before, after)]


def test_every_architecture_stands_in_the_table():
    assert sorted([*INTO, *LEFT_OUT]) == MODEL_TYPES


@pytest.mark.parametrize("model_type", INTO)
def test_every_block_of_an_architecture_can_be_folded_into(model_type):
    stack = find_stack(tiny_model(model_type, 6))
    found = repairable_folds(Loaded.of(stack))
    assert list(found) == list(range(6))
    assert {path_of(stack, fold) for fold in found.values()} == INTO[model_type]


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_an_architecture_is_left_out_for_a_reason(model_type):
    for reason in folds_of(find_stack(tiny_model(model_type, 6)), range(6), None).values():
        assert isinstance(reason, ArchitectureError)
        assert LEFT_OUT[model_type] in str(reason)


@pytest.mark.parametrize("model_type", INTO)
def test_repair_brings_the_stream_nearer_to_the_originals(model_type):
    stack = find_stack(tiny_model(model_type, 6))
    before, after = residuals(stack, removable_pair(model_type)[-1], SAMPLES, ridges=(1e-2,))
    assert after < before


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next", "nemotron_h"])
def test_a_shared_experts_matrix_mends_more_than_gains_of_all_experts(model_type, monkeypatch):
    block = {"deepseek_v3": 4, "qwen3_next": 4, "nemotron_h": 2}[model_type]
    stack = find_stack(tiny_model(model_type, 6, dtype=torch.float64))
    (fold,) = folds_of(stack, [block - 1], None)[block - 1]
    assert isinstance(fold, Projection)
    assert (fold.gate is not None) == (model_type == "qwen3_next")
    before, by_matrix = residuals(stack, block, HELD_OUT)
    assert by_matrix < before
    if model_type == "nemotron_h":  # whose record names nothing that could be scaled
        return
    monkeypatch.setattr("excise.repair.cuts.matrices_of", lambda sublayer: [])
    other = find_stack(tiny_model(model_type, 6, dtype=torch.float64))
    assert isinstance(folds_of(other, [block - 1], None)[block - 1][0], Gain)
    assert by_matrix < residuals(other, block, HELD_OUT)[1]


@pytest.mark.parametrize(("multiplier", "into"), [(0.3, "feed-forward"), (1.2, "attention"), (0.8, "mamba")])
def test_multipliers_on_the_way_to_the_stream_are_found(multiplier, into):
    multipliers = {"mlp_multipliers": [0.5, 0.3], "attention_out_multiplier": 1.2, "ssm_out_multiplier": 0.8}
    stack = find_stack(tiny_model("falcon_h1", 6, dtype=torch.float64, **multipliers))
    (fold,) = folds_of(stack, [2], [into])[2]
    assert isinstance(fold, Projection)
    assert fold.scale == pytest.approx(multiplier, rel=1e-12)


@pytest.mark.parametrize("squash", [torch.tanh, lambda output: nn.functional.rms_norm(output, output.shape[-1:])])
def test_what_is_not_linear_on_the_way_to_the_stream_is_refused(squash):
    stack = find_stack(tiny_model("llama", 6, dtype=torch.float64))
    for module in (stack.blocks[2].module.mlp, stack.blocks[3].module):
        module.register_forward_hook(lambda module, args, output: squash(output))
    found = folds_of(stack, [1, 2, 3], None)
    assert isinstance(found[1][0], Projection)
    for block, message in ((2, "is not that of one matrix"), (3, "is not the rest of it plus a multiple")):
        with pytest.raises(ArchitectureError, match=message):
            raise found[block]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_huge_hide_nothing(dtype):
    """One channel of one token is 10⁴, beside others below 2, as in many trained models."""
    stack = find_stack(tiny_model("llama", 6, dtype=dtype))
    with torch.no_grad():
        stack.model.get_input_embeddings().weight[0, 5] = 1e4
    stack.blocks[3].module.mlp.register_forward_hook(lambda module, args, output: torch.tanh(output))
    found = folds_of(stack, [2, 3], None)
    assert found[2][0].scale == 1
    assert isinstance(found[3], ArchitectureError)


def test_blocks_are_asked_once():
    stack, calls = find_stack(tiny_model("llama", 6)), []
    stack.blocks[1].module.register_forward_hook(lambda *_: calls.append(1))
    first = folds_of(stack, [1, 4], None)
    asked = len(calls)
    assert folds_of(stack, [1], None)[1] == first[1]
    assert len(calls) == asked > 0
    assert folds_of(stack, [1], ["attention"])[1] != first[1]


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4"])
def test_gemma_4_without_shared_keys_and_values_is_repaired(model_type):
    stack = find_stack(tiny_model(model_type, 6, **UNSHARED))
    assert not stack.shares_kv
    for block in stack.blocks:
        block.module.layer_scalar.fill_(0.5 + block.index / 10)
    stack = find_stack(stack.model)
    assert stack.blocks[2].sublayers[-1].kind == SCALE
    found = repairable_folds(Loaded.of(stack))
    assert list(found) == list(range(6))
    assert [fold.scale for fold in found.values()] == pytest.approx([0.5 + block / 10 for block in range(6)])
    before, after = residuals(stack, 2, SAMPLES, ridges=(1e-2,))
    assert after < before
