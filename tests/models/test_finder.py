"""The finder proposes for known families what their records say, and refuses what is no residual stack."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from excise.cli import app
from excise.errors import ArchitectureError
from excise.models.architectures import ARCHITECTURES, Architecture, SublayerRecord
from excise.models.finder import find_record
from excise.models.stack import find_stack
from tests.random_samples import traces
from tests.tiny import MODEL_TYPES, VOCABULARY, tiny_folder, tiny_model


def built(text):
    """The record that the proposal's lines make."""
    return eval(text, {"Architecture": Architecture, "SublayerRecord": SublayerRecord})


def paths(stack):
    """Module paths of each block's sublayers."""
    names = [{id(module): name for name, module in block.module.named_modules()} for block in stack.blocks]
    return tuple(tuple(names[b.index][id(s.module)] for s in b.sublayers) for b in stack.blocks)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_proposes_what_the_record_of_a_known_family_says(model_type, monkeypatch):
    model = tiny_model(model_type)
    expected = find_stack(model)
    before = traces(model)
    monkeypatch.delitem(ARCHITECTURES, expected.architecture.model_type)
    found = find_record(model)
    assert traces(model) == before
    assert found.stack == expected.architecture.stack
    assert found.sublayers == paths(expected)
    assert set(found.index_attributes) == set(expected.architecture.index_attributes)
    # The lines as printed, with what only a reader of the model can know filled in, read the model as the record does.
    record = built(found.record())
    steps = {k: getattr(expected.architecture, k) for k in ("logit_divisor", "logit_multiplier", "logit_softcap")}
    monkeypatch.setitem(ARCHITECTURES, record.model_type, dataclasses.replace(record, **steps))
    proposed = find_stack(model)
    assert [block.kind for block in proposed.blocks] == [block.kind for block in expected.blocks]
    assert paths(proposed) == paths(expected)


def test_config_entries_that_may_count_blocks_are_pointed_out():
    text = find_record(tiny_model("qwen2")).record()
    assert 'per_block_keys=("layer_types",),  # lists as long as the stack' in text
    assert "max_window_layers=3" in text.splitlines()[-1]


def test_constants_that_multiply_outputs_are_pointed_out():
    found = find_record(tiny_model("granite"))
    assert found.factors[2] == pytest.approx((0.7, 0.7), rel=1e-4)
    assert found.record().endswith("# outputs are multiplied by 0.7 before they are added")


def test_modules_of_an_unknown_architecture_are_found_and_named_in_the_error():
    config = AutoConfig.for_model(
        "stablelm", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, use_parallel_residual=True, partial_rotary_factor=1.0,
    )  # fmt: skip
    with pytest.raises(ArchitectureError, match="a forward pass of this one suggests") as error:
        find_stack(AutoModelForCausalLM.from_config(config))
    assert 'SublayerRecord("attention", "self_attn", writes=("self_attn.o_proj",)),' in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32}, "no residual block|no stack of blocks"),
        ("opt", {"num_attention_heads": 4, "do_layer_norm_before": False}, "layers.0 .* is no residual block"),
    ],
)
def test_what_is_no_residual_stack_is_refused(model_type, options, reason):
    """Both normalise the sum of input and output, so no gate removes a block."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 3}
    if model_type == "xlnet":
        common = {"vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **common, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    with pytest.raises(ArchitectureError, match=reason):
        find_record(model)


def test_layers_without_residuals_are_refused():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(32, 32)

        def forward(self, hidden_states, **_):
            return torch.tanh(self.mix(hidden_states))

    model = tiny_model("llama", layers=2)
    model.model.layers = torch.nn.ModuleList([Layer(), Layer()])
    with pytest.raises(ArchitectureError, match="no residual block: what it changes"):
        find_record(model)


def test_the_verb_prints_the_proposal(tmp_path):
    folder = tiny_folder(tmp_path / "model", "qwen3_next", layers=3)
    result = CliRunner().invoke(app, ["inspect", str(folder), "--find"])
    assert result.exit_code == 0, result.output
    assert built(result.stdout).model_type == "qwen3_next"
    assert "checked by a forward pass" in result.stdout
    as_json = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--find", "--json"]).stdout)
    assert as_json["sublayers"][2] == ["self_attn", "mlp"]
    assert built(as_json["record"]) == built(result.stdout)
