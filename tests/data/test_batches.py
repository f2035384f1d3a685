"""Batches hold every sample once, within the budget, padded on the right."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from excise.data.batches import IGNORED, make_batches
from tests.random_samples import random_samples


def random_lengths(seed):
    generator = np.random.default_rng(seed)
    return [int(n) for n in np.minimum(2 + generator.geometric(0.05, size=int(generator.integers(1, 60))), 90)]


@pytest.mark.parametrize("budget", [1, 16, 64, 200])
@pytest.mark.parametrize("seed", range(4))
def test_every_sample_once_and_within_the_budget(seed, budget):
    samples = random_samples(random_lengths(seed), seed=seed)
    batches = make_batches(samples, budget)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(samples)))
    for batch in batches:
        assert batch.input_ids.shape == batch.labels.shape == (len(batch.indices), int(batch.lengths.max()))
        assert batch.input_ids.numel() <= budget or len(batch.indices) == 1
    assert sum(batch.tokens for batch in batches) == samples.tokens


def test_similar_lengths_come_together_and_the_budget_is_used():
    batches = make_batches(random_samples(range(2, 42), seed=0), 120)
    for earlier, later in itertools.pairwise(batches):
        assert earlier.lengths.min() >= later.lengths.max()
        assert earlier.input_ids.shape[1] * (len(earlier.indices) + 1) > 120


def test_rows_hold_the_samples_and_their_labels():
    samples = random_samples((4, 9, 6), seed=3)
    (batch,) = make_batches(samples, 1000)
    assert batch.indices == (1, 2, 0)
    assert batch.lengths.tolist() == [9, 6, 4]
    assert batch.real.sum(dim=1).tolist() == [9, 6, 4]
    for row, index in enumerate(batch.indices):
        sample, length = samples[index], len(samples[index].input_ids)
        assert batch.input_ids[row, :length].tolist() == sample.input_ids.tolist()
        assert batch.real[row].tolist() == [True] * length + [False] * (9 - length)
        expected = [
            int(token) if counted else IGNORED
            for token, counted in zip(sample.input_ids[1:], sample.counted[1:], strict=True)
        ]
        assert batch.labels[row].tolist() == expected + [IGNORED] * (9 - length + 1)


def test_the_grouping_depends_on_lengths_alone():
    lengths = random_lengths(7)
    groups = [[b.indices for b in make_batches(random_samples(lengths, seed=seed), 64)] for seed in (0, 1)]
    assert groups[0] == groups[1]
