"""Distillation losses: chunked against plain formulas in float64, values and gradients; the teacher's top k."""

from __future__ import annotations

import pytest
import torch

from excise.data.batches import IGNORED
from excise.errors import ArchitectureError
from excise.healing import losses
from excise.healing.losses import DenseTargets, SparseTargets, counted_rows, hidden_loss, vocabulary_loss
from excise.models.stack import find_stack
from tests.tiny import VOCABULARY, tiny_model

GENERATOR_SEED = 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 7 * VOCABULARY)


def problem(model_type, **options):
    """Student, teacher, the student's hidden states, the teacher's, and labels with ignored positions."""
    student, teacher = (find_stack(tiny_model(model_type, 2, dtype=torch.float64, seed=s, **options)) for s in (0, 1))
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    hidden, goal = (torch.randn(3, 11, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(VOCABULARY, (3, 11), generator=generator)
    labels[torch.rand(3, 11, generator=generator) < 0.3] = IGNORED
    return student, teacher, hidden, goal, labels


def plain(student, teacher, hidden, goal, labels, temperature, weight):
    """The same loss over whole logits, by the textbook."""
    mask = labels != IGNORED
    z, t = student.logits(hidden)[mask], teacher.logits(goal)[mask].detach()
    p, q = (torch.log_softmax(logits / temperature, dim=-1) for logits in (t, z))
    divergence = temperature**2 * (p.exp() * (p - q)).sum()
    return divergence + weight * torch.nn.functional.cross_entropy(z, labels[mask], reduction="sum")


def gradients(loss, hidden, head):
    wanted = [hidden, *head.parameters()]
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (1.0, 0.5), (2.5, 0.0), (2.5, 0.5)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "gpt2"])
def test_chunked_equals_plain_in_values_and_gradients(model_type, temperature, weight):
    student, teacher, hidden, goal, labels = problem(model_type)
    rows = counted_rows(labels)
    got = vocabulary_loss(
        student,
        hidden.requires_grad_(),
        labels,
        DenseTargets(teacher, goal[rows], temperature),
        temperature=temperature,
        cross_entropy=weight,
    )
    expected = plain(student, teacher, hidden, goal, labels, temperature, weight)
    assert got.count == int((labels != IGNORED).sum())
    torch.testing.assert_close(got.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.divergence + weight * got.cross_entropy, expected, rtol=1e-12, atol=0)
    head = student.model.get_output_embeddings()
    ours, theirs = gradients(3 * got.total, hidden, head), gradients(3 * expected, hidden, head)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_head_with_bias_gets_its_gradient():
    student, teacher, hidden, goal, labels = problem("llama")
    head = student.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64))
    got = vocabulary_loss(student, hidden.requires_grad_(), labels, DenseTargets(teacher, goal[counted_rows(labels)]))
    expected = plain(student, teacher, hidden, goal, labels, 1.0, 0.0)
    for a, b in zip(gradients(got.total, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_frozen_heads_and_passes_without_gradient_cost_none():
    student, teacher, hidden, goal, labels = problem("llama")
    student.model.requires_grad_(False)
    targets = DenseTargets(teacher, goal[counted_rows(labels)])
    loss = vocabulary_loss(student, hidden.requires_grad_(), labels, targets).total
    loss.backward()
    assert hidden.grad.abs().max() > 0
    assert student.model.get_output_embeddings().weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(vocabulary_loss(student, hidden, labels, targets).total, loss.detach())


def test_the_teacher_itself_has_no_divergence_and_no_gradient():
    student, _, hidden, _, labels = problem("llama")
    loss = vocabulary_loss(
        student, hidden.requires_grad_(), labels, DenseTargets(student, hidden.detach()[counted_rows(labels)])
    )
    loss.total.backward()
    assert loss.total.item() == 0
    assert hidden.grad.abs().max() == 0


def test_no_counted_position_gives_nothing():
    student, teacher, hidden, goal, labels = problem("llama")
    labels[:] = IGNORED
    loss = vocabulary_loss(student, hidden.requires_grad_(), labels, DenseTargets(teacher, goal[counted_rows(labels)]))
    loss.total.backward()
    assert (loss.total.item(), loss.count) == (0, 0)
    assert hidden.grad.abs().max() == 0


def top(teacher, goal, labels, k, temperature=1.0):
    log_p = torch.log_softmax(teacher.logits(goal[counted_rows(labels)]).detach() / temperature, dim=-1)
    values, tokens = log_p.topk(k)
    return SparseTargets(tokens, values, log_p.exp().scatter(1, tokens, 0.0).sum(dim=-1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_tends_to_the_full_divergence_from_below(temperature):
    student, teacher, hidden, goal, labels = problem("llama")
    hidden.requires_grad_()
    rows = counted_rows(labels)
    full = vocabulary_loss(
        student, hidden, labels, DenseTargets(teacher, goal[rows], temperature), temperature=temperature
    )
    values = []
    for k in (1, 8, 64, 256, VOCABULARY):
        targets = top(teacher, goal, labels, k, temperature)
        values.append(vocabulary_loss(student, hidden, labels, targets, temperature=temperature))
    totals = [value.total.item() for value in values]
    assert totals == sorted(totals)
    assert totals[0] < 0.9 * full.total.item()
    torch.testing.assert_close(values[-1].total, full.total, rtol=1e-12, atol=0)
    head = student.model.get_output_embeddings()
    for a, b in zip(gradients(values[-1].total, hidden, head), gradients(full.total, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 8, 64])
def test_top_k_is_the_divergence_over_k_plus_one_outcomes(k):
    student, teacher, hidden, goal, labels = problem("llama")
    targets = top(teacher, goal, labels, k)
    loss = vocabulary_loss(student, hidden.requires_grad_(), labels, targets)
    q = torch.softmax(student.logits(hidden)[labels != IGNORED], dim=-1)
    q_top = q.gather(1, targets.tokens)
    p = torch.cat([targets.log_probs.exp(), targets.rest.unsqueeze(1)], dim=1)
    expected = (p * (p / torch.cat([q_top, 1 - q_top.sum(dim=1, keepdim=True)], dim=1)).log()).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=0)
    head = student.model.get_output_embeddings()
    for a, b in zip(gradients(loss.total, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_teacher_that_is_certain_leaves_no_remainder():
    student, _, hidden, _, labels = problem("llama")
    positions = len(counted_rows(labels)[0])
    tokens = torch.arange(positions).unsqueeze(1) % VOCABULARY
    targets = SparseTargets(tokens, torch.zeros(positions, 1), torch.zeros(positions))
    loss = vocabulary_loss(student, hidden.requires_grad_(), labels, targets)
    expected = torch.nn.functional.cross_entropy(
        student.logits(hidden)[labels != IGNORED], tokens[:, 0], reduction="sum"
    )
    torch.testing.assert_close(loss.total, expected)
    assert loss.total.isfinite()


def test_hidden_loss_is_the_relative_squared_distance_of_real_tokens():
    generator = torch.Generator().manual_seed(0)
    a, b = ({i: torch.randn(2, 4, 8, generator=generator) for i in (3, 5)} for _ in range(2))
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = sum(
        ((a[i] - b[i])[r, t] ** 2).sum() / (b[i][r, t] ** 2).sum() for i in (3, 5) for r, t in real.nonzero().tolist()
    )
    torch.testing.assert_close(hidden_loss(a, b, real), expected / 2)
    assert hidden_loss(a, a, real) == 0


def test_a_head_of_another_make_is_refused():
    student, teacher, hidden, goal, labels = problem("llama")
    student.model.lm_head = torch.nn.Sequential(student.model.lm_head)
    with pytest.raises(ArchitectureError, match="one matrix, this model's is a Sequential"):
        vocabulary_loss(student, hidden, labels, DenseTargets(teacher, goal[counted_rows(labels)]))
