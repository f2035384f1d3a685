"""Distributions that are kept: one head for each candidate, and divergences from the whole or from the top of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from excise.data.batches import IGNORED
from excise.measuring import divergence
from excise.measuring.distributions import Top, Whole
from excise.measuring.measure import known_removals, measure
from excise.models.loading import load
from excise.models.stack import find_stack
from excise.repair.measured import known_repaired, measure_repaired
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import VOCABULARY, tiny_folder, tiny_model

SAMPLES, FITTING = random_samples([11, 7, 13, 5, 9]), random_samples([8, 12, 6], seed=1)
REMOVALS = [(1,), (2,), (4,), (1, 2), (1, 3), (2, 3, 4)]
FEW = 24


@pytest.fixture(scope="module")
def stack():
    return find_stack(tiny_model("llama", initializer_range=0.2))


@pytest.fixture
def few(monkeypatch):
    """So small a number of tokens told apart that a tiny vocabulary has more."""
    monkeypatch.setattr(divergence, "TOP_K", FEW)


def states(seed, dtype, positions=9):
    return torch.randn(positions, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def probabilities(stack, hidden):
    """[positions, vocabulary] in float64."""
    logits = hidden.double() @ stack.model.get_output_embeddings().weight.double().T
    if cap := getattr(stack.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)


def outcomes(p, tokens):
    """The probabilities of some tokens, and of all others together."""
    kept = p.gather(1, tokens.long())
    return torch.cat([kept, p.scatter(1, tokens.long(), 0.0).sum(dim=-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("k", "dtype"), [(None, "float32"), (FEW, "float32"), (FEW, "float64"), (VOCABULARY, "float64")]
)
def test_distances_are_the_naive_ones(model_type, k, dtype):
    dtype = getattr(torch, dtype)
    stack = find_stack(tiny_model(model_type, dtype=dtype, initializer_range=0.2))
    intact, pruned = states(0, dtype), states(1, dtype)
    kept = Whole.of(stack, intact) if k is None else Top.of(stack, intact, k)
    found = kept.divergence(slice(2, 7), stack.logits(pruned[2:7]))
    rejected = kept.rejection(slice(2, 7), stack.logits(pruned[2:7]))
    p, q = probabilities(stack, intact), probabilities(stack, pruned)
    if k is not None:
        assert torch.equal(kept.tokens.long(), p.topk(k).indices)
        p, q = outcomes(p, kept.tokens), outcomes(q, kept.tokens)
    expected = torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum(dim=-1)[2:7]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        rejected.double(), 1 - torch.minimum(p, q).sum(dim=-1)[2:7], rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(kept.rest.double(), torch.zeros(9) if k is None else p[:, -1], check_dtype=False)


def test_the_head_is_applied_once_to_the_original_and_once_to_each_candidate(stack):
    through = []
    head = stack.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: through.append(args[0].shape[:-1].numel()))
    try:
        measured = measure(context_of(stack, batch_tokens=24), SAMPLES, REMOVALS, statistic="divergence")
    finally:
        handle.remove()
    assert sum(through) == (1 + len(REMOVALS)) * measured.counts.sum()
    assert measured.distributions == {"top_k": None, "kept_mass": 1.0}


@pytest.mark.parametrize("repaired", [False, True])
def test_what_does_not_fit_is_measured_from_the_top_with_nearly_the_same_ranks(stack, repaired, few, tmp_path):
    def run(room):
        context = context_of(stack, tmp_path, batch_tokens=24, distribution_bytes=room)
        if repaired:
            measured = measure_repaired(context, FITTING, SAMPLES, REMOVALS, statistic="divergence")
            return measured, known_repaired(context, FITTING, SAMPLES, "divergence")
        measured = measure(context, SAMPLES, REMOVALS, statistic="divergence")
        return measured, known_removals(context, SAMPLES, statistic="divergence")

    of_all = 4 * VOCABULARY * sum(sample.targets for sample in SAMPLES)
    whole, _ = run(of_all)
    top, known = run(of_all // 8)
    assert set(known) == set(REMOVALS)
    assert (whole.distributions["top_k"], top.distributions["top_k"]) == (None, FEW)
    # Other entries of the store: neither is taken for the other, and both are found again.
    assert 0.3 < top.losses.max() / whole.losses.max() < 0.999
    assert (top.sums <= whole.sums + 1e-6).all()
    # Without repair the ranks are the same; refitted matrices of a random model leave two neighbours in another order.
    assert spearmanr(top.losses, whole.losses).statistic >= (0.9 if repaired else 1)
    for room, first in ((of_all, whole), (of_all // 8, top)):
        again, _ = run(room)
        np.testing.assert_array_equal(again.sums, first.sums)
        assert again.distributions == first.distributions


def test_the_mass_told_is_that_of_the_most_probable_tokens(stack, few):
    measured = measure(context_of(stack, distribution_bytes=0), SAMPLES, [(2,)], statistic="divergence")
    kept = []
    for batch in context_of(stack).batches(SAMPLES):
        p = torch.softmax(stack.model(batch.input_ids).logits.double(), dim=-1)
        kept.append(p[batch.labels != IGNORED].topk(FEW).values.sum(dim=-1))
    assert measured.distributions["kept_mass"] == pytest.approx(torch.cat(kept).mean().item(), abs=1e-6)


@pytest.mark.parametrize("statistic", ["divergence", "rejection"])
def test_a_streamed_model_is_measured_from_the_same(statistic, few, tmp_path):
    folder = str(tiny_folder(tmp_path / "model", "llama", 5, initializer_range=0.2))
    stacks = [load(folder, placement=placement).stack for placement in ("resident", "streamed")]
    found = [
        measure(context_of(s, batch_tokens=24, distribution_bytes=0), SAMPLES, REMOVALS[:3], statistic=statistic)
        for s in stacks
    ]
    np.testing.assert_allclose(found[1].sums, found[0].sums, rtol=1e-6, atol=1e-6)
    assert found[1].distributions == pytest.approx(found[0].distributions)
