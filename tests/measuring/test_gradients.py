"""A against ordinary autograd with explicit gates and against central differences; resuming, parts, bad samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from excise.data.batches import make_batches
from excise.data.samples import Sample, Samples
from excise.errors import InputError
from excise.ising.energies.path import path_positions
from excise.ising.gradients import Gradients
from excise.measuring.losses import sample_losses
from excise.measuring.score import gate_gradients, score
from excise.models.stack import find_stack, first, gated, override_forward
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import MODEL_TYPES, VOCABULARY, tiny_model

BATCH_TOKENS = 24  # of samples of 2 to 14 tokens: several batches, most of them padded
FLOAT32_NORM = 2e-5  # transformers' RMSNorm computes in float32 even in a float64 model
EXACT = {"gpt2", "gpt_neox"}  # LayerNorm, float64 throughout


def tolerance(model_type):
    return 1e-11 if model_type in EXACT else FLOAT32_NORM


def plain_loss(model, sample):
    """Mean cross-entropy of one unpadded sample by the stock forward."""
    logits = model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False).logits[0]
    targets, counted = torch.from_numpy(sample.input_ids[1:]), torch.from_numpy(sample.counted[1:])
    return torch.nn.functional.cross_entropy(logits[:-1][counted], targets[counted])


def autograd_gradients(stack, samples, gates):
    """A, one sample at a time, by autograd through gates that are multiplied in."""
    rows = []
    for sample in samples:
        alpha = torch.ones(gates, dtype=torch.float64, requires_grad=True)
        with gated(stack, alpha):
            rows.append(torch.autograd.grad(plain_loss(stack.model, sample), alpha)[0])
    return torch.stack(rows).numpy()


def assert_close(actual, expected, relative):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def float64_stack(model_type, layers=4):
    return find_stack(tiny_model(model_type, layers, dtype=torch.float64))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_autograd_with_explicit_gates(model_type):
    stack, samples = float64_stack(model_type), random_samples()
    ours = score(context_of(stack, batch_tokens=BATCH_TOKENS), samples)
    assert ours.A.dtype == np.float64
    assert_close(ours.A, autograd_gradients(stack, samples, len(stack.sublayers)), tolerance(model_type))
    assert_close(ours.blocks(), autograd_gradients(stack, samples, len(stack.blocks)), tolerance(model_type))
    expected_losses = [plain_loss(stack.model, sample).item() for sample in samples]
    np.testing.assert_allclose(ours.losses, expected_losses, rtol=tolerance(model_type))


@pytest.mark.parametrize("model_type", sorted(EXACT))
def test_equals_central_differences(model_type):
    stack, samples, step = float64_stack(model_type), random_samples(), 1e-5
    differences = np.zeros((len(samples), len(stack.sublayers)))
    for gate in range(len(stack.sublayers)):
        losses = []
        for shift in (step, -step):
            alpha = torch.ones(len(stack.sublayers), dtype=torch.float64)
            alpha[gate] += shift
            with torch.no_grad(), gated(stack, alpha):
                losses.append([plain_loss(stack.model, sample).item() for sample in samples])
        differences[:, gate] = (np.array(losses[0]) - np.array(losses[1])) / (2 * step)
    assert_close(score(context_of(stack, batch_tokens=BATCH_TOKENS), samples).A, differences, 1e-8)


def test_block_gradients_are_sums_over_sublayers():
    gradients = score(context_of(float64_stack("gemma2"), batch_tokens=BATCH_TOKENS), random_samples())
    np.testing.assert_array_equal(gradients.blocks(), gradients.A[:, 0::2] + gradients.A[:, 1::2])
    assert gradients.gate_blocks == (0, 0, 1, 1, 2, 2, 3, 3)
    assert gradients.gate_kinds == ("attention", "feed-forward") * 4


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_forward_stays_bit_identical_and_nothing_is_left_behind(model_type):
    model = tiny_model(model_type, 4)
    stack = find_stack(model)
    before = traces(model)
    assert before["hooks"] == {}
    states = []
    stack.blocks[-1].module.register_forward_hook(
        lambda module, args, output: states.append(first(output).detach().clone())
    )
    batch = make_batches(random_samples(), 64)[0]
    with torch.no_grad():
        expected = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).means
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _, losses = gate_gradients(stack, batch)
    assert torch.equal(states[1], states[0])
    assert torch.equal(losses, expected)
    stack.blocks[-1].module._forward_hooks.clear()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    score(context_of(stack), random_samples())
    assert traces(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_exception_leaves_the_model_as_it_was(checkpointing):
    model = tiny_model("llama", 4)
    stack = find_stack(model)
    stack.blocks[1].module.mlp.up_proj.weight.requires_grad_(False)
    before = traces(model)

    def broken(*args, **kwargs):
        raise RuntimeError("broken block")

    with (
        override_forward({stack.blocks[2].module.mlp: broken}),
        pytest.raises(RuntimeError, match="broken block"),
    ):
        score(context_of(stack), random_samples(), checkpointing=checkpointing)
    assert traces(model) == before


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_checkpointing_changes_nothing(model_type):
    stack, samples = find_stack(tiny_model(model_type, 4)), random_samples()
    plain = score(context_of(stack, batch_tokens=BATCH_TOKENS), samples)
    checkpointed = score(context_of(stack, batch_tokens=BATCH_TOKENS), samples, checkpointing=True)
    np.testing.assert_array_equal(checkpointed.A, plain.A)
    np.testing.assert_array_equal(checkpointed.losses, plain.losses)


def test_checkpointing_runs_each_block_again_in_the_backward_pass():
    stack = find_stack(tiny_model("llama", 4))
    runs = []
    stack.blocks[2].module.mlp.act_fn.register_forward_hook(lambda *_: runs.append(1))
    score(context_of(stack, batch_tokens=200), random_samples())
    assert len(runs) == 1
    score(context_of(stack, batch_tokens=200), random_samples(), checkpointing=True)
    assert len(runs) == 3


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokens_in_the_padding_do_not_matter(model_type):
    stack = float64_stack(model_type)
    (batch,) = make_batches(random_samples((11, 3, 6)), 64)
    other = batch.input_ids.clone()
    other[~batch.real] = torch.arange(int((~batch.real).sum())) + 20
    rows, losses = gate_gradients(stack, batch)
    other_rows, other_losses = gate_gradients(stack, dataclasses.replace(batch, input_ids=other))
    torch.testing.assert_close(other_rows, rows, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(other_losses, losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral"])
def test_between_intact_and_removed_every_sample_has_gates_of_its_own(model_type, tmp_path):
    stack, samples = float64_stack(model_type), random_samples()
    positions = path_positions(4, len(samples), [2], seed=0)
    ours = score(context_of(stack, batch_tokens=BATCH_TOKENS), samples, positions=positions)
    rows = []
    for sample, y in zip(samples, positions, strict=True):
        alpha = torch.tensor(1 - y, requires_grad=True)
        with gated(stack, alpha):
            rows.append(torch.autograd.grad(plain_loss(stack.model, sample), alpha)[0])
    assert_close(ours.blocks(), torch.stack(rows).numpy(), tolerance(model_type))
    ours.save(tmp_path / "g.safetensors")
    np.testing.assert_array_equal(Gradients.load(tmp_path / "g.safetensors").positions, positions)
    with pytest.raises(InputError, match="positions must be"):
        score(context_of(stack), samples, positions=positions[:2])


def test_batches_of_another_size_give_the_same_rows():
    stack, samples = float64_stack("gpt2"), random_samples()
    one_by_one = score(context_of(stack, batch_tokens=1), samples)
    assert_close(score(context_of(stack, batch_tokens=1000), samples).A, one_by_one.A, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_accumulates_in_float32(dtype):
    samples = random_samples()
    ours = score(context_of(find_stack(tiny_model("llama", 4, dtype=dtype))), samples).A
    exact = score(context_of(float64_stack("llama")), samples).A
    assert ours.dtype == np.float32
    assert_close(ours, exact, 0.1 if dtype == torch.bfloat16 else 1e-4)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    model = tiny_model("llama", 4)
    stack, samples = find_stack(model), random_samples()
    whole = score(context_of(stack, batch_tokens=BATCH_TOKENS), samples)
    before = traces(model)
    tokens = []

    def interrupt(done):
        tokens.append(done)
        if len(tokens) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(
            context_of(stack, batch_tokens=BATCH_TOKENS, folder=tmp_path / "journal", told=interrupt),
            samples,
        )
    assert traces(model) == before
    forwards, advanced = [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    resumed = score(
        context_of(stack, batch_tokens=BATCH_TOKENS, folder=tmp_path / "journal", told=advanced.append),
        samples,
    )
    assert len(forwards) == len(make_batches(samples, BATCH_TOKENS)) - 2
    assert sum(advanced) == samples.tokens
    np.testing.assert_array_equal(resumed.A, whole.A)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.provenance == whole.provenance


def test_other_settings_data_or_models_share_a_folder(tmp_path):
    """Such as the same pass in smaller batches, after it ran out of memory."""
    stack, samples = find_stack(tiny_model("llama", 4)), random_samples()
    whole = score(context_of(stack, tmp_path, batch_tokens=BATCH_TOKENS), samples)
    for other_stack, other_samples, batch_tokens in (
        (stack, samples, BATCH_TOKENS - 8),
        (stack, random_samples(seed=1), BATCH_TOKENS),
        (find_stack(tiny_model("llama", 4, seed=1)), samples, BATCH_TOKENS),
    ):
        alone = score(context_of(other_stack, batch_tokens=batch_tokens), other_samples)
        beside = score(context_of(other_stack, tmp_path, batch_tokens=batch_tokens), other_samples)
        np.testing.assert_array_equal(beside.A, alone.A)
    again = score(context_of(stack, tmp_path, batch_tokens=BATCH_TOKENS), samples)
    np.testing.assert_array_equal(again.A, whole.A)


def poisoned_stack():
    """A model whose last token has no embedding."""
    model = tiny_model("llama", 4, dtype=torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = torch.nan
    return find_stack(model)


def with_poison(samples, places):
    items = list(samples)
    for place in places:
        ids = items[place].input_ids.copy()
        ids[0] = VOCABULARY - 1
        items[place] = dataclasses.replace(items[place], input_ids=ids)
    return Samples(tuple(items))


def test_a_sample_that_is_not_finite_is_named_skipped_and_counted():
    clean = random_samples([5] * 12, below=VOCABULARY - 1)
    expected = score(context_of(float64_stack("llama"), batch_tokens=20), clean)
    gradients = score(context_of(poisoned_stack(), batch_tokens=20), with_poison(clean, [7]))
    assert gradients.skipped == ("random:7",)
    assert gradients.names == tuple(name for name in expected.names if name != "random:7")
    np.testing.assert_array_equal(gradients.A, np.delete(expected.A, 7, axis=0))
    np.testing.assert_array_equal(gradients.losses, np.delete(expected.losses, 7))


def test_too_many_that_are_not_finite_are_an_error():
    samples = with_poison(random_samples([5] * 12, below=VOCABULARY - 1), [3, 7])
    with pytest.raises(InputError, match=r"2 of 12 samples .* not finite \(first: random:3, random:7\)"):
        score(context_of(poisoned_stack()), samples)


def test_a_sample_without_counted_tokens_has_zero_gradient():
    ids = np.arange(10, 16)
    silent = Sample("silent", ids, np.array([True] + [False] * 5))
    gradients = score(context_of(float64_stack("gpt2")), Samples((*random_samples(), silent)))
    assert not gradients.A[-1].any()
    assert gradients.losses[-1] == 0
    assert np.abs(gradients.A[:-1]).max(axis=1).min() > 0


def test_saved_and_loaded_are_the_same(tmp_path):
    gradients = score(context_of(find_stack(tiny_model("mixtral", 4))), random_samples())
    gradients = dataclasses.replace(gradients, skipped=("bad:1",))
    gradients.save(tmp_path / "gradients.safetensors")
    loaded = Gradients.load(tmp_path / "gradients.safetensors")
    np.testing.assert_array_equal(loaded.A, gradients.A)
    np.testing.assert_array_equal(loaded.losses, gradients.losses)
    for field in ("gate_blocks", "gate_kinds", "names", "skipped", "provenance"):
        assert getattr(loaded, field) == getattr(gradients, field), field
    assert loaded.gate_kinds == ("attention", "moe") * 4
    assert [path.name for path in tmp_path.iterdir()] == ["gradients.safetensors"]


def test_files_that_hold_no_gradients_are_refused(tmp_path):
    path = tmp_path / "gradients.safetensors"
    with pytest.raises(InputError, match="no gradients file"):
        Gradients.load(path)
    score(context_of(find_stack(tiny_model("llama", 4))), random_samples()).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="damaged"):
        Gradients.load(path)
    save_file({"A": np.zeros((2, 2))}, path)
    with pytest.raises(InputError, match="holds no gradients"):
        Gradients.load(path)


def test_the_gate_of_a_block_that_scales_the_stream():
    """Gemma 4's trained blocks multiply the whole stream by s; at 0, that gate undoes it."""
    model = tiny_model("gemma4_text", 4, dtype=torch.float64, num_kv_shared_layers=0)
    for block, scale in zip(model.model.layers, (0.5, 1.0, 2.0, 0.25), strict=True):
        block.layer_scalar.fill_(scale)
    stack, samples = find_stack(model), random_samples()
    assert [s.kind for s in stack.sublayers].count("scale") == 3
    ours = score(context_of(stack, batch_tokens=BATCH_TOKENS), samples)
    assert_close(ours.A, autograd_gradients(stack, samples, len(stack.sublayers)), FLOAT32_NORM)
    assert_close(ours.blocks(), autograd_gradients(stack, samples, len(stack.blocks)), FLOAT32_NORM)


def test_gates_away_from_one_where_a_sublayer_gives_tokens_in_one_row():
    """OPT's feed-forward returns [batch × tokens, width]."""
    stack, samples = float64_stack("opt"), random_samples((6, 6))
    (batch,) = make_batches(samples, 64)
    alpha = torch.rand(2, len(stack.sublayers), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, _ = gate_gradients(stack, batch, alpha=alpha)
    for row, i in zip(rows, batch.indices, strict=True):
        gates = alpha[list(batch.indices).index(i)].clone().requires_grad_(True)
        with gated(stack, gates):
            expected = torch.autograd.grad(plain_loss(stack.model, samples[i]), gates)[0]
        assert_close(row.numpy(), expected.numpy(), 1e-11)
