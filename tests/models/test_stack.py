"""Gates and bypass leave no trace, mean what they say, and hold for every architecture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import ARCHITECTURES
from excise.models.stack import block_indices, bypass, find_stack, gated, override_forward
from tests.random_samples import traces
from tests.tiny import MODEL_TYPES, tiny_config, tiny_model

PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120, 64, 200, 15, 41], [90, 12, 12, 77, 280, 6, 31, 199, 55, 100]])


@torch.no_grad()
def logits_of(model):
    return model(input_ids=PROMPT, use_cache=False).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gates_at_one_leave_logits_bit_identical(model_type):
    model = tiny_model(model_type)
    expected = logits_of(model)
    stack = find_stack(model)
    for gates in (len(stack.sublayers), len(stack.blocks)):
        with gated(stack, torch.ones(gates)):
            assert not traces(model)["hooks"]
            assert torch.equal(logits_of(model), expected)
    with gated(stack, torch.ones(len(stack.sublayers), requires_grad=True)):
        assert len(traces(model)["hooks"]) == len(stack.sublayers)
        assert torch.equal(logits_of(model), expected)
    with bypass(stack, ()):
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gates_at_zero_equal_bypass(model_type):
    model = tiny_model(model_type)
    stack = find_stack(model)
    intact = logits_of(model)
    for choice in ((0,), (1, 2), (0, 3, 5), tuple(range(6))):
        removed = [block for block in choice if block not in stack.fixed]
        alpha = torch.ones(len(stack.blocks))
        alpha[removed] = 0
        with gated(stack, alpha):
            gates_off = logits_of(model)
        with bypass(stack, removed):
            bypassed = logits_of(model)
        assert torch.equal(gates_off, bypassed)
        assert not torch.allclose(bypassed, intact, atol=1e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_gate_moves_the_logits(model_type):
    model = tiny_model(model_type)
    stack = find_stack(model)
    intact = logits_of(model)
    for sublayer in stack.sublayers:
        alpha = torch.ones(len(stack.sublayers))
        alpha[sublayer.gate] = 0.5
        with gated(stack, alpha):
            assert not torch.allclose(logits_of(model), intact, atol=1e-5), sublayer.name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hidden_and_head_reproduce_the_logits(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    stack = find_stack(model)
    with torch.no_grad():
        logits = stack.logits(stack.hidden(PROMPT))
    expected = logits_of(model)
    tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-6  # some models give float32 whatever they compute in
    torch.testing.assert_close(logits, expected.double(), rtol=tolerance, atol=tolerance)
    assert logits.dtype == torch.float64


def test_one_gate_a_block_is_the_gate_of_each_of_its_sublayers():
    model = tiny_model("gemma2")
    stack = find_stack(model)
    alpha = torch.linspace(0.2, 1.3, 6)
    with gated(stack, alpha):
        shared = logits_of(model)
    with gated(stack, alpha.repeat_interleave(2)):
        assert torch.equal(logits_of(model), shared)


def test_gates_of_another_number_are_refused():
    stack = find_stack(tiny_model("llama"))
    with pytest.raises(InputError, match=r"12 \(sublayers\) or 6 \(blocks\), got 5"), gated(stack, torch.ones(5)):
        pass


def test_no_hook_or_forward_stays_behind_even_after_an_exception():
    model = tiny_model("llama")
    stack = find_stack(model)
    before = traces(model)
    assert before["hooks"] == {}
    assert before["forwards"] == {}
    during = []

    def interrupted():
        with gated(stack, torch.zeros(12)), bypass(stack, (1, 2)):
            during.append(traces(model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(during[0]["forwards"]) == 2
    assert len(during[0]["hooks"]) == 12
    assert traces(model) == before


def test_override_gives_wrappers_from_before_back():
    model = tiny_model("llama")
    stack = find_stack(model)
    module = stack.blocks[3].module
    original = module.forward

    def wrapper(*args, **kwargs):
        return original(*args, **kwargs)

    module.forward = wrapper  # as accelerate does
    expected = logits_of(model)
    with override_forward({module: lambda x, *_, **__: x}):
        assert not torch.equal(logits_of(model), expected)
    assert module.__dict__["forward"] is wrapper
    assert torch.equal(logits_of(model), expected)


def test_a_bypassed_block_costs_nothing():
    model = tiny_model("llama")
    stack = find_stack(model)
    ran = []
    for sublayer in stack.sublayers:
        sublayer.module.register_forward_hook(lambda *_, gate=sublayer.gate: ran.append(gate))
    with bypass(stack, (-1, 2)):
        logits_of(model)
    assert ran == [0, 1, 2, 3, 6, 7, 8, 9]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_blocks_and_gates_are_counted_bottom_to_top(model_type):
    model = tiny_model(model_type, layers=4)
    stack = find_stack(model)
    assert [block.index for block in stack.blocks] == [0, 1, 2, 3]
    assert [sublayer.gate for sublayer in stack.sublayers] == list(range(len(stack.sublayers)))
    assert [sublayer.block for sublayer in stack.sublayers] == [b.index for b in stack.blocks for _ in b.sublayers]
    assert len({sublayer.name for sublayer in stack.sublayers}) == len(stack.sublayers)
    assert not model.training


KINDS = {  # of the six blocks of a tiny model
    "nemotron_h": ["mamba", "moe", "mamba", "attention", "feed-forward", "moe"],
    "mamba2": ["mamba"] * 6,
    "falcon_h1": ["mamba+attention+feed-forward"] * 6,
    "granitemoehybrid": ["mamba+moe+feed-forward", "attention+moe+feed-forward"] * 3,
    "jamba": [
        "mamba+feed-forward",
        "attention+moe",
        "mamba+feed-forward",
        "mamba+moe",
        "attention+feed-forward",
        "mamba+moe",
    ],
    "lfm2": ["convolution+feed-forward", "convolution+feed-forward", "attention+feed-forward"] * 2,
    "qwen3_5": ["linear-attention+feed-forward"] * 2 + ["attention+feed-forward"],
    "qwen3_next": [
        "linear-attention+moe",
        "linear-attention+feed-forward",
        "attention+moe",
        "linear-attention+moe",
        "linear-attention+moe",
        "attention+moe",
    ],
    "qwen3_moe": ["attention+moe", "attention+feed-forward"] + ["attention+moe"] * 2 + ["attention+feed-forward"],
    "deepseek_v3": ["attention+feed-forward"] * 2 + ["attention+moe"] * 4,
    "glm4_moe": ["attention+feed-forward"] * 2 + ["attention+moe"] * 4,
    "mixtral": ["attention+moe"] * 6,
    "gemma4": ["attention+feed-forward+per-layer-input"] * 6,
    "llama": ["attention+feed-forward"] * 6,
}


@pytest.mark.parametrize("model_type", sorted(KINDS))
def test_kinds_of_blocks(model_type):
    expected = KINDS[model_type]
    assert [block.kind for block in find_stack(tiny_model(model_type)).blocks][: len(expected)] == expected


def test_gemma4_with_experts():
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    stack = find_stack(tiny_model("gemma4_text", **experts, hidden_size_per_layer_input=0, num_kv_shared_layers=0))
    assert [block.kind for block in stack.blocks] == ["attention+moe"] * 6
    assert list(stack.fixed) == [5]


def test_blocks_that_others_depend_on_are_fixed():
    stack = find_stack(tiny_model("gemma4_text"))
    assert stack.fixed[2] == "blocks 4 use its keys and values"
    assert sorted(stack.fixed) == [2, 3, 5]
    with pytest.raises(ArchitectureError, match="block 3 cannot be removed: blocks 5 use its keys and values"):
        bypass(stack, [1, 3])


def scaled_stack(scales=(0.5, 1.0, 2.0, 0.25)):
    """A Gemma 4 whose blocks multiply the residual stream, as trained ones do."""
    model = tiny_model("gemma4_text", layers=4, dtype=torch.float64, num_kv_shared_layers=0)
    for block, scale in zip(model.model.layers, scales, strict=True):
        block.layer_scalar.fill_(scale)
    return find_stack(model)


def test_a_block_that_scales_the_stream_has_a_gate_for_it():
    stack = scaled_stack()
    assert [block.sublayers[-1].kind for block in stack.blocks] == ["scale", "per-layer-input", "scale", "scale"]
    assert stack.blocks[0].sublayers[-1].parameters == 0
    intact = logits_of(stack.model)
    for removed in ([0], [1, 2], [0, 1, 2]):
        alpha = torch.ones(4, dtype=torch.float64)
        alpha[removed] = 0
        with gated(stack, alpha):
            gates_off = logits_of(stack.model)
        with bypass(stack, removed):
            assert (logits_of(stack.model) - gates_off).abs().max() < 1e-5
        assert (gates_off - intact).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model_type", "lacking"), [("llama", "attention"), ("falcon_h1", "mamba"), ("granitemoehybrid", "feed-forward")]
)
def test_a_record_that_lacks_a_sublayer_is_noticed(model_type, lacking, monkeypatch):
    record = ARCHITECTURES[model_type]
    rest = tuple(entry for entry in record.sublayers if entry.kind != lacking)
    monkeypatch.setitem(ARCHITECTURES, model_type, dataclasses.replace(record, sublayers=rest))
    with pytest.raises(ArchitectureError, match="still change the residual stream"):
        find_stack(tiny_model(model_type))


def test_a_gate_before_a_norm_after_the_sublayer_is_no_removal():
    """OPT-350m normalises the sum, not the branch."""
    with pytest.raises(ArchitectureError, match="do_layer_norm_before"):
        find_stack(tiny_model("opt", do_layer_norm_before=False))


def test_parameters_and_bytes_of_a_block():
    stack = find_stack(tiny_model("llama", dtype=torch.bfloat16))
    heads = 2 * 32 * 32 + 2 * 32 * 16  # query and output, key and value
    assert stack.blocks[0].parameters == heads + 3 * 32 * 64 + 2 * 32
    assert stack.blocks[0].bytes == 2 * stack.blocks[0].parameters


def test_block_indices_are_sorted_originals():
    stack = find_stack(tiny_model("llama"))
    assert block_indices(stack, [4, -6, 2]) == (0, 2, 4)
    assert block_indices(stack, []) == ()
    with pytest.raises(InputError, match=r"between 0 and 5 .* got \[6, -7\]"):
        block_indices(stack, [6, 1, -7])
    with pytest.raises(InputError, match="named twice"):
        block_indices(stack, [5, -1])


def test_unknown_model_type_names_it_and_the_page():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "stablelm", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
        )
    )
    with pytest.raises(ArchitectureError, match=r"'stablelm' is not known.*CONTRIBUTING\.md"):
        find_stack(model)


def test_blocks_that_depend_on_their_place_are_refused():
    with pytest.raises(ArchitectureError, match="scale_attn_by_inverse_layer_idx=True"):
        find_stack(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True))


def test_a_model_without_head_is_refused():
    with pytest.raises(ArchitectureError, match="does not look like the llama"):
        find_stack(AutoModel.from_config(tiny_config("llama")))


@pytest.mark.parametrize(("model_type", "step"), [("granite", "logit_divisor"), ("gemma2", "logit_softcap")])
def test_a_record_that_lacks_a_step_after_the_stack_is_noticed(model_type, step, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, model_type, dataclasses.replace(ARCHITECTURES[model_type], **{step: None}))
    with pytest.raises(ArchitectureError, match="lacks a step"):
        find_stack(tiny_model(model_type))
