"""Closed-form repair: against naive least squares, its limits, what it refuses, and what it leaves behind."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from excise.context import Context
from excise.errors import ArchitectureError, InputError
from excise.measuring.measure import measure
from excise.models.loading import Loaded
from excise.models.stack import bypass, find_stack, first, gated
from excise.models.stored import Stored
from excise.repair.refitted import Repair
from excise.repair.repair import FEATURES, Folding, number_of_fits, repair, repair_each, repaired
from excise.repair.ridge import GainEquations, NormalEquations
from excise.repair.streams import WEIGHTINGS
from excise.surgery.checkpoint import write_pruned
from excise.surgery.self_test import self_test
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

REPAIRABLE = ("llama", "gpt2", "gpt_neox", "granite", "phi3", "qwen2")
DOWN = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
LENGTHS = (11, 7, 16, 9, 13, 5, 16, 12, 8, 10)


def fit(stack, removed, samples, *, held_out=None, batch_tokens=None, stored=None, **folding):
    """The repair of one removal of a model in memory, below the cuts alone; `folding` as for `Folding`."""
    folding = {"above": False} | {name: tuple(v) if isinstance(v, list) else v for name, v in folding.items()}
    loaded = Loaded(stack, None, "", stored or stack.model.dtype)
    context = Context(loaded, batch_tokens=batch_tokens)
    return repair(context, removed, samples, held_out=held_out, folding=Folding(**folding))


def stack_of(model_type, **options):
    return find_stack(tiny_model(model_type, 6, dtype=torch.float64, **options))


def down_projection(stack, block):
    return stack.blocks[block].module.get_submodule(DOWN.get(stack.model.config.model_type, "mlp.down_proj"))


def streams(stack, sample, removed, at, module=None):
    """Stream after block `at` and the input and output of `module`, for one sample, without padding or resuming."""
    seen = {}
    handles = [
        stack.blocks[at].module.register_forward_hook(lambda m, a, out: seen.update(stream=first(out)[0])),
    ]
    if module is not None:
        handles.append(module.register_forward_hook(lambda m, a, out: seen.update(input=a[0][0], output=out[0])))
    with torch.no_grad(), bypass(stack, removed):
        stack.hidden(torch.from_numpy(sample.input_ids).unsqueeze(0))
    for handle in handles:
        handle.remove()
    return seen


def token_weights(stack, sample, at, weighting):
    """Weights of one sample's tokens, by autograd through the stock loss."""
    ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
    stream = streams(stack, sample, (), at)["stream"]
    if weighting == "uniform":
        return torch.ones(len(stream), dtype=torch.float64)
    if weighting == "norm":
        return 1 / stream.square().sum(dim=-1)
    kept = {}
    shift = torch.zeros_like(stream, requires_grad=True)
    handle = stack.blocks[at].module.register_forward_hook(
        lambda m, a, out: kept.update(out=first(out) + shift) or kept["out"]
    )
    logits = stack.model(input_ids=ids, use_cache=False).logits[0, :-1]
    handle.remove()
    counted = torch.from_numpy(sample.counted)[1:]
    loss = torch.nn.functional.cross_entropy(logits[counted], ids[0, 1:][counted], reduction="sum")
    return torch.autograd.grad(loss, shift)[0].square().sum(dim=-1)


def naive_matrix(stack, original, samples, removed, below, top, weighting, features, ridge):
    """New weight [in, out] of the down projection of block `below`: least squares on stacked, augmented rows."""
    module = down_projection(stack, below)
    scale = getattr(stack.model.config, "residual_multiplier", 1.0)
    phi, rest, weights = [], [], []
    for sample in samples:
        student = streams(stack, sample, removed, below, module)
        target = streams(original, sample, (), top)["stream"]
        phi.append(student["input"] if features == "input" else student["output"] * scale)
        rest.append(target - student["stream"])
        weights.append(token_weights(original, sample, top, weighting))
    root = torch.cat(weights).sqrt().unsqueeze(1)
    rows, targets = torch.cat(phi) * root, torch.cat(rest) * root
    size = (ridge * rows.square().sum(dim=0).mean()).sqrt()
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    augmented = (
        torch.cat([rows, size * eye]),
        torch.cat([targets, torch.zeros(rows.shape[1], targets.shape[1], dtype=torch.float64)]),
    )
    change = torch.linalg.lstsq(*augmented).solution
    weight = module.weight if stack.model.config.model_type == "gpt2" else module.weight.T
    return weight + change / scale if features == "input" else weight @ (eye + change)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "granite"])
def test_each_cut_equals_naive_least_squares_on_the_stream_repaired_so_far(model_type, weighting, features):
    stack, original, samples, removed = stack_of(model_type), stack_of(model_type), random_samples(LENGTHS), (2, 3, 5)
    fitted = fit(stack, removed, samples, features=features, weighting=weighting, ridges=[0.03], batch_tokens=40)
    assert [(step.block, step.run) for step in fitted.steps] == [(1, (2, 3)), (4, (5,))]
    names = {module: name for name, module in stack.model.named_modules()}
    for below, top in ((1, 3), (4, 5)):
        expected = naive_matrix(stack, original, samples, removed, below, top, weighting, features, ridge=0.03)
        module = down_projection(stack, below)
        got = fitted.weights[f"{names[module]}.weight"]
        torch.testing.assert_close(got if model_type == "gpt2" else got.T, expected, rtol=1e-5, atol=1e-6)
        module.weight.data = got  # the next cut is fitted on the repaired stream
        if f"{names[module]}.bias" in fitted.weights:
            module.bias.data = fitted.weights[f"{names[module]}.bias"]


@pytest.mark.parametrize("removed", [(2, 3), (1, 2, 4)])
def test_the_block_above_a_cut_is_refitted_after_the_one_below(removed):
    """Towards the original's stream after itself; the block between two cuts is refitted for the upper one alone."""
    stack, original, samples = stack_of("llama"), stack_of("llama"), random_samples(LENGTHS)
    fitted = fit(stack, removed, samples, above=True, ridges=[0.03], batch_tokens=40)
    expected = {(2, 3): [(1, 3), (4, 4)], (1, 2, 4): [(0, 2), (3, 4), (5, 5)]}[removed]
    assert [step.block for step in fitted.steps] == [block for block, _ in expected]
    assert {step.run for step in fitted.steps} == ({(2, 3)} if len(removed) == 2 else {(1, 2), (4,)})
    for block, top in expected:
        matrix = naive_matrix(stack, original, samples, removed, block, top, "uniform", "input", ridge=0.03)
        got = fitted.weights[f"model.layers.{block}.mlp.down_proj.weight"]
        torch.testing.assert_close(got.T, matrix, rtol=1e-5, atol=1e-6)
        down_projection(stack, block).weight.data = got
    assert fit(stack, [4, 5], samples, above=True).steps[-1].block == 3, "nothing is above the last block"


@pytest.mark.parametrize("model_type", REPAIRABLE)
def test_a_map_is_folded_exactly(model_type):
    """The repaired projection's output, bias and all, is the old one's times T."""
    stack, samples = stack_of(model_type), random_samples(LENGTHS)
    module = down_projection(stack, 2)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.normal_(generator=torch.Generator().manual_seed(1))
    fitted = fit(stack, [3], samples, features="output", ridges=[0.1])
    before = streams(stack, samples[0], [3], 2, module)["output"]
    with repaired(stack, fitted):
        after = streams(stack, samples[0], [3], 2, module)["output"]
    rows = torch.cat([streams(stack, sample, [3], 2, module)["output"] for sample in samples])
    with repaired(stack, fitted):
        mapped = torch.cat([streams(stack, sample, [3], 2, module)["output"] for sample in samples])
    T = torch.linalg.lstsq(rows, mapped).solution
    torch.testing.assert_close(after, before @ T, rtol=1e-7, atol=1e-8)
    assert not torch.allclose(after, before, rtol=1e-2)


@pytest.mark.parametrize("features", FEATURES)
def test_an_infinite_ridge_changes_nothing(features):
    stack = stack_of("llama")
    fitted = fit(stack, [2, 4], random_samples(LENGTHS), features=features, ridges=[math.inf])
    assert len(fitted.weights) == 2
    for name, weight in fitted.weights.items():
        assert torch.equal(weight, stack.model.get_parameter(name).data)
    huge = fit(stack, [2, 4], random_samples(LENGTHS), features=features, ridges=[1e14])
    for name, weight in huge.weights.items():
        torch.testing.assert_close(weight, stack.model.get_parameter(name).data, rtol=1e-9, atol=1e-9)


def test_a_block_that_is_linear_in_the_output_below_is_repaired_exactly():
    """Block 2's stream is made block 1's plus a fixed map of block 1's feed-forward output."""
    stack, samples = stack_of("llama"), random_samples([16] * 12)
    B = 0.5 * torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 32**0.5
    kept = {}
    handles = [
        down_projection(stack, 1).register_forward_hook(lambda m, a, out: kept.update(M=out)),
        # Where blocks are probed one by one, block 1 has not run on the tokens that pass here.
        stack.blocks[2].module.register_forward_hook(
            lambda m, a, out: kept["in"] + kept["M"] @ B if kept["M"].shape == kept["in"].shape else out
        ),
        stack.blocks[2].module.register_forward_pre_hook(
            lambda m, a, k: kept.update({"in": a[0] if a else k["hidden_states"]}), with_kwargs=True
        ),
    ]
    try:
        ids = torch.from_numpy(samples[0].input_ids).unsqueeze(0)
        with torch.no_grad():
            expected = stack.hidden(ids)
        fitted = fit(stack, [2], samples, features="output", ridges=[1e-12])
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad(), repaired(stack, fitted), bypass(stack, [2]):
        torch.testing.assert_close(stack.hidden(ids), expected, rtol=1e-6, atol=1e-6)
    assert fitted.steps[0].error < 1e-12


def test_held_out_errors_are_those_of_the_solutions():
    generator = torch.Generator().manual_seed(0)
    phi, rest, weights = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (8, 5, 1))
    weights = weights.square().squeeze(1)
    fit, held_out = (NormalEquations.zeros(8, 5, torch.device("cpu")) for _ in range(2))
    fit.add(phi[:40], rest[:40], weights[:40])
    held_out.add(phi[40:], rest[40:], weights[40:])
    ridges = [1e-3, 0.1, 10.0, math.inf]
    errors = fit.held_out_errors(held_out, ridges)
    for ridge, error in zip(ridges, errors, strict=True):
        left = weights[40:] @ (rest[40:] - phi[40:] @ fit.solve(ridge)).square().sum(dim=1)
        assert error == pytest.approx(float(left / (weights[40:] @ rest[40:].square().sum(dim=1))), rel=1e-9)
    assert errors[-1] == 1.0


def test_the_ridge_chosen_has_the_smallest_held_out_error():
    stack, samples = stack_of("llama"), random_samples(LENGTHS)
    alone = {ridge: fit(stack, [3], samples, ridges=[ridge]).steps[0].error for ridge in (1e-4, 1.0, math.inf)}
    chosen = fit(stack, [3], samples, ridges=list(alone)).steps[0]
    assert alone[chosen.ridge] == min(alone.values()) == chosen.error
    assert alone[math.inf] == 1.0


def test_results_depend_neither_on_batches_nor_on_padding():
    stack, samples = stack_of("llama"), random_samples(LENGTHS)
    whole = fit(stack, [2, 4], samples, weighting="gradient", batch_tokens=1000)
    single = fit(stack, [2, 4], samples, weighting="gradient", batch_tokens=1)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(weight, single.weights[name], rtol=1e-7, atol=1e-9)
    assert whole.forward_tokens == pytest.approx(single.forward_tokens)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_neox"])
def test_attention_can_be_folded_into_too(model_type):
    stack, samples = stack_of(model_type), random_samples([16] * 12)
    into = ("attention",) if model_type == "mixtral" else ("attention", "feed-forward")
    fitted = fit(stack, [3], samples, into=into, features="output", held_out=samples)
    assert [step.kind for step in fitted.steps] == list(into)
    assert all(step.error < 1 for step in fitted.steps)
    assert fitted.losses.repaired != fitted.losses.pruned


def test_losses_are_measured_on_the_held_out_samples():
    stack, held_out = stack_of("llama"), random_samples([14] * 5, seed=1)
    fitted = fit(stack, [2, 4], random_samples(LENGTHS), held_out=held_out)
    intact, pruned = measure(context_of(stack), held_out, [(), (2, 4)]).losses
    with repaired(stack, fitted) as removed:
        after = measure(context_of(stack), held_out, [removed]).losses[0]
    assert (fitted.losses.intact, fitted.losses.pruned, fitted.losses.repaired) == pytest.approx(
        (intact, pruned, after)
    )
    assert fitted.losses.delta_after == pytest.approx(after - intact)


def test_the_model_is_left_as_it_was():
    stack = stack_of("llama")
    state, before = copy.deepcopy(stack.model.state_dict()), traces(stack.model)
    fitted = fit(stack, [2, 4], random_samples(LENGTHS), held_out=random_samples(seed=1))

    def changed():
        return {name for name, value in stack.model.state_dict().items() if not torch.equal(value, state[name])}

    assert changed() == set()
    with repaired(stack, fitted):
        assert changed() == set(fitted.weights) == {f"model.layers.{b}.mlp.down_proj.weight" for b in (1, 3)}
    assert changed() == set()
    with pytest.raises(KeyboardInterrupt), repaired(stack, fitted):
        raise KeyboardInterrupt
    assert changed() == set()
    assert traces(stack.model) == before


@pytest.mark.parametrize("weighting", ["uniform", "gradient"])
def test_several_removals_are_repaired_as_each_alone_and_share_the_originals_pass(weighting):
    stack, samples, held_out = stack_of("llama"), random_samples(LENGTHS), random_samples([14] * 3, seed=1)
    removals, seen = [(4,), (1, 3)], []
    context, folding = context_of(stack, told=seen.append), Folding(weighting=weighting, above=False)
    together = list(repair_each(context, removals, samples, held_out=held_out, folding=folding))
    alone = [fit(stack, removed, samples, held_out=held_out, weighting=weighting) for removed in removals]
    for one, other in zip(together, alone, strict=True):
        # The cost too: what a resumed job repaired before must not show in it.
        assert (one.removed, one.steps, one.losses) == (other.removed, other.steps, other.losses)
        assert one.forward_tokens == other.forward_tokens
        assert all(torch.equal(one.weights[name], weight) for name, weight in other.weights.items())
    assert sum(seen) == samples.tokens * (1 + 1 + 2) + 2 * 3 * held_out.tokens
    assert list(repair_each(context_of(stack), [], samples)) == []


def test_weights_are_rounded_as_they_will_be_stored_before_anything_is_measured():
    stack = find_stack(tiny_model("llama", 6))
    held_out = random_samples([14] * 3, seed=1)
    fitted = fit(stack, [2], random_samples(LENGTHS), held_out=held_out, stored=torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in fitted.weights.values())
    with repaired(stack, fitted):
        down = down_projection(stack, 1).weight.data
        assert torch.equal(down, down.bfloat16().float())
        assert measure(context_of(stack), held_out, [(2,)]).losses[0] == fitted.losses.repaired


def test_wide_matrices_have_their_output_mapped_instead(monkeypatch):
    stack = stack_of("llama")
    assert fit(stack, [2], random_samples(LENGTHS)).steps[0].features == "input"
    monkeypatch.setattr("excise.repair.folds.WIDEST_INPUT", 63)
    wide = fit(stack, [2], random_samples(LENGTHS))
    mapped = fit(stack, [2], random_samples(LENGTHS), features="output")
    assert wide.steps[0].features == "output"
    assert all(torch.equal(wide.weights[name], weight) for name, weight in mapped.weights.items())


def test_a_repair_survives_its_file(tmp_path):
    stack = find_stack(tiny_model("llama", 6, dtype=torch.bfloat16))
    fitted = fit(stack, [2], random_samples(LENGTHS), held_out=random_samples(seed=1), ridges=[0.1, math.inf])
    fitted.save(tmp_path / "repair.safetensors")
    loaded = Repair.load(tmp_path / "repair.safetensors")
    assert loaded.describe() == fitted.describe()
    assert loaded.steps == fitted.steps
    assert loaded.losses == fitted.losses
    assert all(torch.equal(loaded.weights[name], weight) for name, weight in fitted.weights.items())
    assert all(weight.dtype == torch.bfloat16 for weight in loaded.weights.values())
    with repaired(stack, loaded) as removed:
        assert removed == (2,)
    for wrong in (tmp_path / "none", __file__):
        with pytest.raises(InputError):
            Repair.load(wrong)


def test_the_repaired_checkpoint_passes_the_self_test(tmp_path):
    stack = find_stack(tiny_model("llama", 6))
    fitted = fit(stack, [2, 4], random_samples(LENGTHS))
    with repaired(stack, fitted) as removed:
        write_pruned(stack, removed, tmp_path / "out")
        report = self_test(stack, removed, tmp_path / "out")
        with torch.no_grad(), gated(stack, torch.tensor([1.0, 1, 0, 1, 0, 1])):
            expected = stack.model(input_ids=torch.arange(12).unsqueeze(0), use_cache=False).logits
    assert report["loads_in_stock_transformers"]
    assert report["cache_agrees"]
    assert report["max_abs_logit_difference"] < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=torch.arange(12).unsqueeze(0)).logits, expected)


@pytest.mark.parametrize("model_type", ["olmo2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss"])
def test_where_no_matrix_makes_the_output_its_channels_are_scaled(model_type, tmp_path):
    stack = find_stack(tiny_model(model_type, 6))
    # Every second block of Qwen3-MoE is dense.
    removed = [3] if model_type == "qwen3_moe" else [2]
    before = {name: value.clone() for name, value in stack.model.state_dict().items()}
    fitted = fit(stack, removed, random_samples(LENGTHS), ridges=[1e-6])
    (step,) = fitted.steps
    assert step.features == "gain"
    assert all(torch.equal(value, before[name]) for name, value in stack.model.state_dict().items())
    # A gain a channel cannot make the error larger on what it was fitted to; and something is fitted.
    assert any(not torch.equal(weight, before[name]) for name, weight in fitted.weights.items())
    with repaired(stack, fitted):
        write_pruned(stack, removed, tmp_path / "out")
        assert self_test(stack, removed, tmp_path / "out")["loads_in_stock_transformers"]


def test_gains_are_the_least_squares_of_each_channel():
    phi, rest = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    fit_part, held_out = GainEquations.zeros(3, phi.device), GainEquations.zeros(3, phi.device)
    fit_part.add(phi[:12], rest[:12], torch.ones(12))
    held_out.add(phi[12:], rest[12:], torch.ones(8))
    for c in range(3):
        expected = torch.linalg.lstsq(phi[:, c : c + 1], rest[:, c]).solution
        torch.testing.assert_close((fit_part + held_out).solve(1e-12)[c], expected[0])
    ridges = [1e-3, 1.0, math.inf]
    errors = [((phi[12:] * fit_part.solve(r) - rest[12:]) ** 2).sum() / (rest[12:] ** 2).sum() for r in ridges]
    assert fit_part.held_out_errors(held_out, ridges) == pytest.approx([float(error) for error in errors])


@pytest.mark.parametrize(
    ("model_type", "removed", "message"),
    [
        ("gemma4_text", [2], "use keys and values of blocks below them"),
    ],
)
def test_what_cannot_be_folded_exactly_is_refused(model_type, removed, message):
    stack = find_stack(tiny_model(model_type, 6))
    with pytest.raises(ArchitectureError, match=message):
        fit(stack, removed, random_samples())
    with pytest.raises(ArchitectureError, match=message):
        number_of_fits(stack, Stored(stack.model.dtype), removed)


def test_a_run_at_block_0_is_repaired_above_alone():
    stack, samples = stack_of("llama"), random_samples(LENGTHS)
    with pytest.raises(ArchitectureError, match="run at block 0 has no kept block below"):
        fit(stack, [0, 1], samples)
    assert [step.block for step in fit(stack, [0, 1], samples, above=True).steps] == [2]
    assert number_of_fits(stack, Stored(stack.model.dtype), [0, 1]) == 1
    assert number_of_fits(stack, Stored(stack.model.dtype), [0, 3, 5]) == 3  # blocks 1, 2 and 4


def test_kinds_that_a_block_lacks_are_refused():
    stack = find_stack(tiny_model("mixtral", 6))
    with pytest.raises(ArchitectureError, match=r"no sublayer 'feed-forward'.*repair 'attention' instead"):
        fit(stack, [2], random_samples(), into=("feed-forward",))


def test_options_that_make_no_sense_are_refused():
    stack, samples = find_stack(tiny_model("llama", 6)), random_samples()
    for options, message in (
        ({"features": "both"}, "expected features in"),
        ({"weighting": "loud"}, "weighting in"),
        ({"ridges": [0.0]}, "ridges > 0"),
        ({"ridges": []}, "at least one"),
        ({"into": ()}, "at least one kind"),
        ({"into": ("mixer",)}, "no sublayer 'mixer'"),
    ):
        with pytest.raises((InputError, ArchitectureError), match=message):
            fit(stack, [2], samples, **options)
    with pytest.raises(InputError, match="at least two samples"):
        fit(stack, [2], samples[:1])
    with pytest.raises(InputError, match="between 1 and 5 removed blocks"):
        fit(stack, [], samples)
    fitted = fit(stack, [2], samples)
    other = find_stack(tiny_model("llama", 6, seed=1))
    with pytest.raises(InputError, match="fitted on another model"), repaired(other, fitted):
        pass


def test_samples_that_overflow_are_refused_and_models_that_do():
    samples = random_samples()
    stack = find_stack(tiny_model("llama", 6))
    with torch.no_grad():
        stack.model.get_input_embeddings().weight[max(samples[0].input_ids)] = np.inf
    with pytest.raises(InputError, match="not finite"):
        fit(stack, [2], samples)
    stack = find_stack(tiny_model("llama", 6))
    with torch.no_grad():
        stack.blocks[1].module.mlp.down_proj.weight.fill_(np.inf)
    with pytest.raises(ArchitectureError, match="stream after block 1 is not finite"):
        fit(stack, [2], samples)
