"""Candidates beside their measured loss."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from excise.choosing.proposal import Proposal
from excise.choosing.verify import verify
from excise.data import load_samples
from excise.errors import InputError
from excise.ising.energies import Energy
from excise.measuring.measure import measure
from excise.measuring.ratios import by_domain
from excise.models.stack import find_stack
from tests.contexts import context_of
from tests.tiny import tiny_model, tiny_tokenizer

PROPOSALS = [Proposal(m, r) for m, r in (("a", (1, 2)), ("b", (0, 3)), ("c", (1, 2)), ("d", (2, 4)), ("e", (3, 4)))]


@pytest.fixture(scope="module")
def stack():
    return find_stack(tiny_model("llama", layers=5, dtype=torch.float64))


@pytest.fixture(scope="module")
def samples():
    return load_samples("starter", tiny_tokenizer(), samples=5, tokens=20)


@pytest.fixture
def energy():
    return Energy(np.arange(5.0), np.eye(5))


def test_candidates_come_by_measured_loss_with_energy_and_size(stack, samples, energy):
    verified = verify(context_of(stack), samples, PROPOSALS, energy)
    measured = measure(context_of(stack), samples, [(), (1, 2), (0, 3), (2, 4), (3, 4)])
    assert verified.base_loss == measured.loss(())
    assert [c.loss for c in verified.candidates] == sorted(c.loss for c in verified.candidates)
    total = sum(p.numel() for p in stack.model.parameters())
    for candidate in verified.candidates:
        assert candidate.loss == measured.loss(candidate.removed)
        assert candidate.delta == candidate.loss - verified.base_loss
        assert candidate.perplexity == pytest.approx(np.exp(candidate.loss))
        excess = measured.of(candidate.removed) - measured.of()
        assert candidate.domains == by_domain(excess, measured.counts, samples.domains)
        assert candidate.energy == sum(candidate.removed) + 2
        assert candidate.parameters == total - 2 * stack.blocks[0].parameters
    assert {c.method for c in verified.candidates} == {"a", "b", "c", "d", "e"}


def test_spearman_counts_each_removal_once(stack, samples, energy):
    verified = verify(context_of(stack), samples, PROPOSALS, energy)
    distinct = {c.removed: (c.energy, c.loss) for c in verified.candidates}
    assert len(distinct) == 4
    assert verified.spearman == pytest.approx(spearmanr(*zip(*distinct.values(), strict=True)).statistic)
    assert verify(context_of(stack), samples, PROPOSALS[:2], energy).spearman is None


def test_nothing_to_verify_is_an_error(stack, samples, energy):
    with pytest.raises(InputError, match="nothing to verify"):
        verify(context_of(stack), samples, [], energy)
