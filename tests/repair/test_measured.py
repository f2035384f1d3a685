"""Damage after repair along the trie: the same as repairing and measuring each removal by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from excise.errors import ArchitectureError
from excise.measuring.measure import measure
from excise.models.loading import Loaded
from excise.models.stack import find_stack
from excise.repair import openings
from excise.repair.measured import known_repaired, measure_repaired, repairable_folds
from excise.repair.openings import Opening, ridge_of
from excise.repair.repair import Folding, repair
from excise.repair.streams import swapped
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

FITTING, JUDGING = random_samples([11, 7, 13, 5, 9]), random_samples([8, 12, 6], seed=1)
REMOVALS = [(1,), (4,), (5,), (1, 2), (2, 3, 5), (1, 3), (4, 5), (0, 3), (0, 1), (1, 4), (0, 1, 2, 3)]


def by_itself(stack, removed, statistic="loss"):
    """Sums [samples] on the judging samples of a removal repaired as `repair` does it, at the measuring ridge."""
    assert statistic == "loss"
    try:
        fitted = repair(context_of(stack), removed, FITTING, folding=Folding(ridges=(ridge_of(FITTING.tokens),)))
    except ArchitectureError:
        return measure(context_of(stack), JUDGING, [removed], statistic=statistic).of(removed)
    with swapped(stack.model, fitted.weights):
        return measure(context_of(stack), JUDGING, [removed]).of(removed)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("granite", {}),
        ("opt", {}),
        ("falcon_h1", {"mlp_multipliers": [0.5, 0.3]}),
        ("nemotron_h", {}),
        ("qwen3_next", {}),
        ("gemma2", {}),
        ("gemma4_text", {"num_kv_shared_layers": 0}),
        ("mixtral", {}),
        ("olmo2", {}),
    ],
)
def test_a_removal_costs_what_it_costs_repaired_by_itself(architecture, options, monkeypatch):
    # `repair` takes one ridge for all it is given.
    monkeypatch.setattr(openings, "GAIN_RIDGE", ridge_of(FITTING.tokens))
    stack = find_stack(tiny_model(architecture, 6, **options).float())
    before = traces(stack.model)
    assert len(repairable_folds(Loaded.of(stack))) == 6
    removals = [r for r in REMOVALS if not set(r) & set(stack.fixed)]
    found = measure_repaired(context_of(stack), FITTING, JUDGING, removals)
    for removed in removals:
        np.testing.assert_allclose(found.of(removed), by_itself(stack, removed), rtol=2e-4)
    assert traces(stack.model) == before


@pytest.mark.parametrize("statistic", ["loss", "divergence"])
def test_it_does_not_matter_what_else_is_measured(statistic):
    stack = find_stack(tiny_model("llama", 6))
    every = [r for k in (1, 2, 3) for r in itertools.combinations(range(6), k)]
    together = measure_repaired(context_of(stack), FITTING, JUDGING, every, statistic=statistic)
    for removed in every[::5]:
        alone = measure_repaired(context_of(stack), FITTING, JUDGING, [removed], statistic=statistic)
        np.testing.assert_allclose(alone.of(removed), together.of(removed), rtol=1e-5, atol=1e-5)
    assert together.forward_tokens < sum(
        measure_repaired(context_of(stack), FITTING, JUDGING, [r], statistic=statistic).forward_tokens for r in every
    )


def test_what_is_not_repaired_costs_what_it_costs_pruned_and_the_intact_model_nothing():
    # Blocks of Gemma 4 read keys and values of others, so that no stream alone tells what they do.
    stack = find_stack(tiny_model("gemma4_text", 6))
    assert not repairable_folds(Loaded.of(stack))
    removals = [r for r in REMOVALS if not set(r) & set(stack.fixed)]
    plain = measure(context_of(stack), JUDGING, removals, statistic="divergence")
    found = measure_repaired(context_of(stack), FITTING, JUDGING, [(), *removals], statistic="divergence")
    np.testing.assert_allclose(found.sums[1:], plain.sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.of(), 0, atol=1e-5)


def test_fewer_tokens_than_features_or_more_give_the_same_fit():
    phi = torch.randn(12, 30, dtype=torch.float64)
    for rows in (phi, phi.T.contiguous()):
        missing = torch.randn(len(rows) // 2, 4, dtype=torch.float64)
        fitted, other = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        added = Opening([fitted, other], [True, False]).added(missing)
        ridge = ridge_of(len(fitted)) * float(fitted.square().sum()) / fitted.shape[1]
        D = torch.linalg.solve(fitted.T @ fitted + ridge * torch.eye(fitted.shape[1]).double(), fitted.T @ missing)
        torch.testing.assert_close(torch.cat(added), rows[: 2 * (len(rows) // 2)] @ D)


@pytest.mark.parametrize("rows", [4, 12])
def test_features_of_nothing_add_nothing_and_those_that_overflow_show(rows):
    missing = torch.randn(rows, 4)
    assert (torch.cat(Opening([torch.zeros(rows, 8)] * 2, [True, False]).added(missing)) == 0).all()
    overflowing = torch.randn(rows, 8)
    overflowing[0, 0] = torch.inf
    assert Opening([overflowing] * 2, [True, False]).added(missing)[1].isnan().all()


def test_an_interrupted_measurement_goes_on(tmp_path):
    stack = find_stack(tiny_model("llama", 6))
    expected = measure_repaired(context_of(stack), FITTING, JUDGING, REMOVALS)
    done = []

    def stop(tokens):
        done.append(tokens)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_repaired(context_of(stack, tmp_path, stop), FITTING, JUDGING, REMOVALS)
    kept = known_repaired(context_of(stack, tmp_path), FITTING, JUDGING, "loss")
    assert 0 < len(kept) < len(REMOVALS)
    again = measure_repaired(context_of(stack, tmp_path), FITTING, JUDGING, REMOVALS)
    np.testing.assert_array_equal(again.sums, expected.sums)
    # Damage without repair, and on other samples to repair on, is kept apart.
    assert not known_repaired(context_of(stack, tmp_path), JUDGING, JUDGING, "loss")
