"""Sublayers removed by themselves: on disk what the original is with their gates at 0, in stock transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from excise.cli import app
from excise.errors import ArchitectureError, CheckpointError, InputError
from excise.ising.spectrum import Spectrum, State
from excise.models.architectures import ARCHITECTURES
from excise.models.stack import find_stack, gated
from excise.surgery.checkpoint import pruned, write_pruned
from excise.surgery.self_test import self_test
from excise.surgery.sublayers import Removal, as_removal, named_sublayers, zeroed
from tests.tiny import EAGER_EXPERTS, MODEL_TYPES, removable_pair, tiny_folder, tiny_model

PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120, 64, 200], [90, 12, 12, 77, 280, 6, 31, 199]])
ONE_A_BLOCK = {"nemotron_h", "mamba2"}


@torch.no_grad()
def logits_of(model):
    return model(input_ids=PROMPT, use_cache=False).logits


def gated_logits(stack, gates):
    alpha = torch.ones(len(stack.sublayers), dtype=torch.float64)
    alpha[list(gates)] = 0
    with gated(stack, alpha):
        return logits_of(stack.model)


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - ONE_A_BLOCK))
def test_zeroed_equals_gates_at_zero_for_every_sublayer(model_type):
    """Every sublayer of every block but one of each, as no block may lose all."""
    stack = find_stack(tiny_model(model_type, dtype=torch.float64))
    before = {name: (p.data_ptr(), p.clone()) for name, p in stack.model.named_parameters()}
    for part in range(max(len(block.sublayers) for block in stack.blocks)):
        gates = [b.sublayers[part].gate for b in stack.blocks if len(b.sublayers) > part]
        expected = gated_logits(stack, gates)
        with zeroed(stack, gates):
            assert (logits_of(stack.model) - expected).abs().max() < 1e-9
        assert (logits_of(stack.model) - expected).abs().max() > 0.1
    for name, parameter in stack.model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "granitemoehybrid", "opt", "gemma4_text"])
def test_blocks_and_sublayers_together_on_disk(model_type, tmp_path):
    stack = find_stack(tiny_model(model_type, dtype=torch.float64))
    removed = removable_pair(model_type)
    gates = [stack.blocks[0].sublayers[0].gate, stack.blocks[3].sublayers[1].gate]
    whole = [s.gate for s in stack.sublayers if s.block in removed]
    recipe = write_pruned(stack, removed, tmp_path / "out", sublayers=gates)
    assert recipe["removed"] == removed
    assert recipe["zeroed_sublayers"] == [stack.sublayers[gate].name for gate in gates]
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True, **EAGER_EXPERTS
    )
    assert not any(loading.values()), loading
    assert (logits_of(model) - gated_logits(stack, [*gates, *whole])).abs().max() < 1e-9
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 sublayers of the others silenced" in card
    assert "no smaller and no faster" in card


def test_a_block_that_loses_all_its_sublayers_goes():
    stack = find_stack(tiny_model("llama"))
    assert as_removal(stack, [4], [2, 3, 6, 8]) == Removal((1, 4), (6,))
    assert as_removal(stack, [-1], []) == Removal((5,), ())
    with pytest.raises(InputError, match=r"between 0 and 11, got \[12\]"):
        as_removal(stack, [], [12])


def test_in_a_hybrid_of_single_sublayers_every_removal_is_of_blocks():
    stack = find_stack(tiny_model("nemotron_h"))
    moe = [sublayer.gate for sublayer in stack.sublayers if sublayer.kind == "moe"]
    assert as_removal(stack, gates=moe) == Removal((1, 5), ())


def test_a_block_that_others_depend_on_is_silenced_and_stays():
    stack = find_stack(tiny_model("gemma4_text", dtype=torch.float64))
    gates = [sublayer.gate for sublayer in stack.blocks[3].sublayers]
    removal = as_removal(stack, gates=gates)
    assert removal == Removal((), tuple(gates))
    with zeroed(stack, removal.zeroed), pruned(stack, [1]) as model:
        silenced = logits_of(model)
    off = [*gates, *(sublayer.gate for sublayer in stack.blocks[1].sublayers)]
    assert (silenced - gated_logits(stack, off)).abs().max() < 1e-9


def test_the_scale_of_a_block_goes_with_it():
    model = tiny_model("gemma4_text", num_kv_shared_layers=0)
    model.model.layers[2].layer_scalar.fill_(0.5)
    stack = find_stack(model)
    with pytest.raises(ArchitectureError, match=r"2\.scale .* can only go with its whole block"):
        as_removal(stack, gates=named_sublayers(stack, ["2.scale"]))


def test_names_of_sublayers():
    stack = find_stack(tiny_model("granitemoehybrid"))
    assert named_sublayers(stack, ["0.mamba", " -1.moe+feed-forward"]) == (0, 16, 17)
    for names, message in (
        (["7.mamba"], "between 0 and 5"),
        (["attention"], "such as 3.attention"),
        (["0.attention"], "block 0 has no sublayer 'attention', only mamba, moe, feed-forward"),
        (["0.moe", "0.moe+feed-forward"], "named twice"),
    ):
        with pytest.raises(InputError, match=message):
            named_sublayers(stack, names)


def test_a_record_that_names_too_few_weights_is_noticed(monkeypatch):
    record = ARCHITECTURES["deepseek_v3"]
    cut = tuple(dataclasses.replace(s, writes=s.writes[:1]) if s.kind == "moe" else s for s in record.sublayers)
    monkeypatch.setitem(ARCHITECTURES, "deepseek_v3", dataclasses.replace(record, sublayers=cut))
    stack = find_stack(tiny_model("deepseek_v3"))
    with pytest.raises(ArchitectureError, match=r"3\.moe still adds"), zeroed(stack, named_sublayers(stack, ["3.moe"])):
        pass


def test_offloaded_weights_are_refused():
    stack = find_stack(tiny_model("llama"))
    block = stack.blocks[2].module
    original = block.mlp.down_proj.weight
    block.mlp.down_proj.weight = torch.nn.Parameter(torch.empty(32, 64, device="meta"))
    with (
        pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight of block 2 is quantised or offloaded"),
        zeroed(stack, [5]),
    ):
        pass
    block.mlp.down_proj.weight = original


def test_the_verb_and_the_self_test(tmp_path):
    folder, out = tiny_folder(tmp_path / "model", "mixtral"), tmp_path / "out"
    names = "3.attention,5.moe"
    result = CliRunner().invoke(
        app, ["prune", str(folder), "--removed", "1", "--removed-sublayers", names, "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["removed"], report["zeroed_sublayers"]) == ([1], names.split(","))
    tested = report["self_test"]
    assert tested["loads_in_stock_transformers"]
    assert tested["cache_agrees"]
    assert tested["max_abs_logit_difference"] < 1e-5 * tested["max_abs_logit"]
    stack = find_stack(tiny_model("mixtral"))
    wrong = self_test(stack, [1], out, sublayers=named_sublayers(stack, ["3.attention"]))
    assert wrong["max_abs_logit_difference"] > 0.1


def test_a_state_over_sublayers_removes_sublayers(tmp_path):
    folder, spectrum = tiny_folder(tmp_path / "model", "llama"), tmp_path / "spectrum.json"
    labels = tuple(f"{block}.attention" for block in range(6))
    Spectrum((State((0, 4), -1.0),), 6, 2, "given", 0.0, labels=labels).save(spectrum)
    assert Spectrum.load(spectrum).labels == labels
    arguments = ["prune", str(folder), "--spectrum", str(spectrum), "--out", str(tmp_path / "out"), "--no-self-test"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "out" / "excise.json").read_text())
    assert (recipe["removed"], recipe["zeroed_sublayers"]) == ([], ["0.attention", "4.attention"])
