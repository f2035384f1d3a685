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
    for removed in ((0,), (1, 2), (0, 3, 5), tuple(range(6))):
        alpha = torch.ones(len(stack.blocks))
        alpha[list(removed)] = 0
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
    torch.testing.assert_close(logits, logits_of(model), rtol=1e-12, atol=1e-12)
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
    assert [sublayer.gate for sublayer in stack.sublayers] == list(range(8))
    assert [sublayer.block for sublayer in stack.sublayers] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {block.kind for block in stack.blocks} <= {"attention+feed-forward", "attention+moe"}
    assert stack.sublayers[3].name == f"1.{stack.sublayers[3].kind}"
    assert not model.training


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
        AutoConfig.for_model("opt", hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ArchitectureError, match=r"'opt' is not known.*CONTRIBUTING\.md"):
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
