"""The final norm's step: gradients against autograd, the Fisher matrix against all labels, and a student it mends."""

import math

import pytest
import torch
from benchmarks.final_norm import divergence, final_norm, norm_gains, step, sums

from excise.models.stack import find_stack
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

LENGTHS = (11, 7, 16, 9, 13, 5, 16, 12, 8, 10)


@pytest.fixture
def stack():
    return find_stack(tiny_model("llama", 6, dtype=torch.float64))


@pytest.fixture
def states(stack):
    generator = torch.Generator().manual_seed(0)
    width = stack.model.config.hidden_size
    return tuple(torch.randn(3000, width, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize(("model_type", "name", "offset"), [("llama", "norm", 0.0), ("gemma2", "norm", 1.0)])
def test_the_weight_that_scales_what_comes_out_is_found(model_type, name, offset):
    stack = find_stack(tiny_model(model_type, 4, dtype=torch.float64))
    before = traces(stack.model)
    found, channels = final_norm(stack)
    assert (found, channels.offset) == (f"model.{name}.weight", offset)
    assert traces(stack.model) == before


def test_sums_are_the_gradient_and_the_fisher_matrix(stack, states):
    teacher, student = states
    gradient, fisher = sums(stack, teacher, student)
    change = torch.zeros(student.shape[1], dtype=torch.float64, requires_grad=True)
    scaled = student * (1 + change)
    p, q = (torch.log_softmax(stack.logits(h), dim=-1) for h in (teacher, scaled))
    (expected,) = torch.autograd.grad((p.exp() * (p - q)).sum(), change)
    torch.testing.assert_close(gradient, expected)
    exact = torch.zeros_like(fisher)
    head = stack.model.get_output_embeddings().weight.detach()
    for h, log_q in zip(student, q.detach(), strict=True):
        rows = head * h
        exact += rows.T @ (log_q.exp().unsqueeze(1) * rows) - torch.outer(log_q.exp() @ rows, log_q.exp() @ rows)
    assert (fisher - exact).norm() < 0.2 * exact.norm()


def test_a_step_mends_channels_of_wrong_size_and_none_changes_nothing(stack, states):
    teacher, _ = states
    factors = torch.linspace(0.8, 1.25, teacher.shape[1], dtype=torch.float64)
    student = teacher * factors
    change = step(*sums(stack, teacher, student), 1e-4)
    assert divergence(stack, teacher, student * (1 + change)) < 0.2 * divergence(stack, teacher, student)
    assert not step(*sums(stack, teacher, student), math.inf).any()


def test_a_norm_that_was_scaled_is_scaled_back(stack):
    samples = random_samples(LENGTHS * 8)
    name, _ = final_norm(stack)
    weight = stack.model.get_parameter(name).data
    factors = torch.linspace(0.5, 1.5, len(weight), dtype=torch.float64)
    before = traces(stack.model)
    # The last block writes almost nothing, so what was done to the norm is all that is to be mended.
    last = stack.model.model.layers[5]
    for matrix in (last.self_attn.o_proj, last.mlp.down_proj):
        matrix.weight.data.mul_(1e-6)
    found = norm_gains(context_of(stack), (5,), {name: weight * factors}, samples)
    assert traces(stack.model) == before
    assert (found[name] - weight).abs().mean() < 0.5 * (weight * factors - weight).abs().mean()
