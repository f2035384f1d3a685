"""Chunked cross-entropy against the plain formula, value and gradient, in float64."""

from __future__ import annotations

import pytest
import torch

from excise.data.batches import IGNORED, shifted_labels
from excise.measuring import losses
from excise.measuring.losses import sample_losses
from excise.models.stack import find_stack
from tests.tiny import VOCABULARY, tiny_model

UPSTREAM = torch.tensor([0.3, -1.7, 2.0], dtype=torch.float64)


def problem(seed=0):
    """Hidden states [3, 7, 32] and labels with a row that counts nowhere."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(3, 7, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.3] = IGNORED
    labels[2] = IGNORED
    return hidden, labels


def plain_sums(model, hidden, labels):
    logits = hidden @ model.get_output_embeddings().weight.T
    if model.config.model_type == "granite":
        logits = logits / model.config.logits_scaling
    if model.config.model_type == "gemma2":
        logits = model.config.final_logit_softcapping * torch.tanh(logits / model.config.final_logit_softcapping)
    log_probabilities = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    picked = torch.gather(log_probabilities, 2, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * (labels != IGNORED)).sum(dim=1)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2"])
def test_equals_the_plain_formula(model_type, chunk_tokens, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_tokens * VOCABULARY)
    model = tiny_model(model_type, dtype=torch.float64)
    stack = find_stack(model)
    hidden, labels = problem()
    ours, naive = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    result, expected = sample_losses(stack, ours, labels), plain_sums(model, naive, labels)
    torch.testing.assert_close(result.sums, expected, rtol=1e-12, atol=1e-12)
    (result.sums * UPSTREAM).sum().backward()
    (expected * UPSTREAM).sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-11, atol=1e-13)
    assert result.counts.tolist() == (labels != IGNORED).sum(dim=1).tolist()
    torch.testing.assert_close(result.means[:2], expected[:2] / result.counts[:2], rtol=1e-12, atol=0)
    assert result.means[2] == 0


def test_means_pass_their_gradient_on():
    model = tiny_model("llama", dtype=torch.float64)
    hidden, labels = problem(1)
    ours, naive = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    sample_losses(find_stack(model), ours, labels).means.sum().backward()
    (plain_sums(model, naive, labels) / (labels != IGNORED).sum(dim=1).clamp(min=1)).sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-11, atol=1e-13)


def test_without_gradient_the_values_are_the_same():
    stack = find_stack(tiny_model("llama", dtype=torch.float64))
    hidden, labels = problem()
    with_gradient = sample_losses(stack, hidden.clone().requires_grad_(True), labels)
    without = sample_losses(stack, hidden, labels)
    assert torch.equal(with_gradient.sums, without.sums)
    assert not without.sums.requires_grad


def test_nothing_counted_gives_zero_and_a_zero_gradient():
    stack = find_stack(tiny_model("llama", dtype=torch.float64))
    hidden, labels = problem()
    hidden.requires_grad_(True)
    result = sample_losses(stack, hidden, torch.full_like(labels, IGNORED))
    result.sums.sum().backward()
    assert result.sums.tolist() == result.counts.tolist() == result.means.tolist() == [0, 0, 0]
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_the_head_sees_a_chunk_at_a_time_and_only_counted_tokens(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * VOCABULARY + 5)
    model = tiny_model("llama")
    stack = find_stack(model)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(len(output)))
    hidden, labels = problem()
    sample_losses(stack, hidden.float(), labels)
    assert max(rows) == 4
    assert sum(rows) == int((labels != IGNORED).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_are_float32(dtype):
    model = tiny_model("llama", dtype=dtype)
    hidden, labels = problem()
    half = hidden.to(dtype).requires_grad_(True)
    result = sample_losses(find_stack(model), half, labels)
    result.sums.sum().backward()
    assert result.sums.dtype == torch.float32
    assert half.grad.dtype == dtype
    expected = plain_sums(model.double(), half.detach().double(), labels)
    torch.testing.assert_close(result.sums.double(), expected, rtol=1e-2, atol=1e-2)


def test_position_t_predicts_token_t_plus_one():
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    counted = torch.tensor([[True, True, False, True], [True, False, True, False]])
    assert shifted_labels(ids, counted).tolist() == [[6, IGNORED, 8, IGNORED], [IGNORED, 11, IGNORED, IGNORED]]
