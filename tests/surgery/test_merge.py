"""Merging: its two rules matrix by matrix, its runs, what it leaves alone, and the checkpoint it writes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from excise.errors import ArchitectureError, InputError
from excise.models.stack import bypass, find_stack
from excise.surgery.checkpoint import write_pruned
from excise.surgery.merge import MATRICES, RULES, Run, check_mergeable, merged, runs_of
from tests.random_samples import traces
from tests.tiny import MODEL_TYPES, tiny_model

MERGEABLE = {"llama", "mistral", "ministral3", "qwen2", "qwen3", "smollm3", "granite"}
PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120, 64, 200, 15, 41]])


def matrix(model, block, name):
    return model.model.layers[block].get_submodule(name).weight


def test_runs_of_any_removal():
    assert runs_of([]) == ()
    assert runs_of([4, 2, 3, 7]) == (Run(1, (2, 3, 4)), Run(6, (7,)))
    assert runs_of([0, 1]) == (Run(2, (0, 1)),)
    assert runs_of([0, 2, 3, 5]) == (Run(1, (0, 2, 3)), Run(4, (5,)))


def test_figure_rule_adds_every_difference():
    model = tiny_model("llama", 6, dtype=torch.float64)
    original = copy.deepcopy(model)
    with merged(find_stack(model), [Run(1, (2, 3, 4))], "figure") as removed:
        assert removed == (2, 3, 4)
        for name in MATRICES:
            base = matrix(original, 1, name)
            expected = base + sum(matrix(original, k, name) - base for k in (2, 3, 4))
            torch.testing.assert_close(matrix(model, 1, name), expected, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(matrix(model, 1, name), matrix(original, 4, name), rtol=0.1)


def test_code_rule_collapses_to_the_top_block():
    model = tiny_model("llama", 6, dtype=torch.float64)
    original = copy.deepcopy(model)
    with merged(find_stack(model), runs_of([2, 3, 4]), "code"):
        for name in MATRICES:
            assert torch.equal(matrix(model, 1, name), matrix(original, 4, name))
            updated = matrix(original, 1, name).clone()  # as the release goes about it
            for k in (2, 3, 4):
                updated += matrix(original, k, name) - updated
            torch.testing.assert_close(matrix(model, 1, name), updated, rtol=1e-12, atol=1e-12)


def test_the_two_rules_agree_on_a_pair_alone():
    model = tiny_model("llama", 4, dtype=torch.float64)
    kept = {}
    for rule in RULES:
        with merged(find_stack(model), [Run(1, (2,))], rule):
            kept[rule] = matrix(model, 1, MATRICES[0]).clone()
    torch.testing.assert_close(kept["figure"], kept["code"], rtol=1e-12, atol=1e-12)


def test_a_run_at_the_bottom_goes_into_the_block_above():
    model = tiny_model("llama", 6, dtype=torch.float64)
    original, name = copy.deepcopy(model), MATRICES[3]
    with merged(find_stack(model), runs_of([0, 1]), "code"):
        assert torch.equal(matrix(model, 2, name), matrix(original, 2, name))
    with merged(find_stack(model), runs_of([0, 1]), "figure"):
        expected = matrix(original, 0, name) + matrix(original, 1, name) - matrix(original, 2, name)
        torch.testing.assert_close(matrix(model, 2, name), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model_type", sorted(MERGEABLE))
def test_everything_else_stays_and_all_comes_back(model_type, rule):
    model = tiny_model(model_type, 6)
    stack, original, before = find_stack(model), copy.deepcopy(model.state_dict()), traces(model)
    touched = {f"model.layers.{b}.{name}.weight" for b in (1, 4) for name in MATRICES}

    def changed():
        return {name for name, value in model.state_dict().items() if not torch.equal(value, original[name])}

    with merged(stack, runs_of([2, 5]), rule) as removed:
        assert changed() == touched
        assert removed == (2, 5)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert changed() == set()
    with pytest.raises(KeyboardInterrupt), merged(stack, runs_of([2, 5]), rule):
        raise KeyboardInterrupt
    assert changed() == set()
    assert traces(model) == before


def test_bfloat16_is_summed_in_float32():
    model = tiny_model("llama", 6, dtype=torch.bfloat16)
    original, name = copy.deepcopy(model), MATRICES[0]
    with merged(find_stack(model), [Run(1, (2, 3, 4))], "figure"):
        wide = [matrix(original, k, name).float() for k in (1, 2, 3, 4)]
        assert torch.equal(matrix(model, 1, name), (wide[1] + wide[2] + wide[3] - 2 * wide[0]).bfloat16())


@pytest.mark.parametrize("rule", RULES)
def test_written_as_a_checkpoint(rule, tmp_path):
    model = tiny_model("llama", 6)
    stack, ids = find_stack(model), {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad(), merged(stack, runs_of([2, 3]), rule) as removed:
        with bypass(stack, removed):
            expected = model(input_ids=PROMPT, use_cache=False).logits
        write_pruned(stack, removed, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=PROMPT, use_cache=False).logits, expected)
        with bypass(stack, [2, 3]):
            dropped = model(input_ids=PROMPT, use_cache=False).logits
    assert not torch.allclose(dropped, expected, atol=1e-2)
    assert ids == {name: id(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "model_type", sorted(set(MODEL_TYPES) & {"gemma2", "gpt2", "gpt_neox", "mixtral", "olmo2", "phi3", "qwen3_moe"})
)
def test_other_architectures_are_refused(model_type):
    stack = find_stack(tiny_model(model_type, 6))
    with (
        pytest.raises(ArchitectureError, match=r"merging.*Drop the blocks instead"),
        merged(stack, [Run(1, (2,))], "code"),
    ):
        pass


def test_blocks_of_several_shapes_and_quantised_ones_are_refused():
    model = tiny_model("llama", 4)
    stack, proj = find_stack(model), model.model.layers[2].mlp.up_proj
    weight = proj.weight
    proj.weight = torch.nn.Parameter(weight[:-1].clone())
    with pytest.raises(ArchitectureError, match=r"one shape; mlp\.up_proj"):
        check_mergeable(stack)
    proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match=r"mlp\.up_proj of block 2 is quantised"):
        check_mergeable(stack)


def test_runs_and_rules_that_make_no_sense_are_refused():
    stack = find_stack(tiny_model("llama", 4))
    for runs, message in (
        ([Run(1, (2,)), Run(2, (3,))], r"blocks \[2\] are merged away and merged into"),
        ([Run(1, (2,)), Run(0, (2,))], "twice"),
        ([Run(1, (4,))], "between 0 and 3"),
        (runs_of([0, 1, 2, 3]), "between 0 and 3"),
    ):
        with pytest.raises(InputError, match=message), merged(stack, runs, "code"):
            pass
    with pytest.raises(InputError, match="figure, code, got 'mean'"), merged(stack, [], "mean"):
        pass
