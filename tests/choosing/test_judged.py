"""What a removal costs, judged: the choice among those that tie, and a domain's damage told from few samples."""

import numpy as np
import pytest

from excise.choosing.candidate import Candidate
from excise.choosing.judged import Judged, settled
from excise.measuring.ratios import by_domain, worst_domain

COUNTS = np.full(8, 10.0)
BASE = np.full(8, 20.0)
DOMAINS = ("code", "verse") * 4


def judged(removed, damage):
    """A removal that costs so many nats per token on each of eight samples."""
    return Judged(removed, BASE, BASE + COUNTS * np.array(damage), COUNTS, DOMAINS)


def test_of_those_that_tie_the_one_whose_worst_domain_suffers_least_is_taken():
    lowest = judged((1,), [0.1, 0.5, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5])
    even = judged((2,), [0.31, 0.33, 0.31, 0.33, 0.31, 0.33, 0.31, 0.33])
    behind = judged((3,), [0.9] * 8)
    removed, tied = settled([lowest, even, behind])
    assert removed == (2,)
    assert [each["removed"] for each in tied] == [[2], [1]]


def test_what_overflows_neither_wins_nor_ties():
    removed, tied = settled([judged((1,), [np.nan] * 8), judged((2,), [0.5] * 8), judged((3,), [np.inf] * 8)])
    assert removed == (2,)
    assert len(tied) == 1


def test_the_worst_domain_is_found_among_many_with_few_samples():
    """Where domains differ, it is nearer the truth than the largest mean; where none does, nearly the mean."""
    generator = np.random.default_rng(0)
    domains = tuple(f"kind {k}" for k in range(12)) * 2
    counts = np.full(24, 100.0)
    for spread, noise, close, share in ((0.0, 0.5, 0.15, 0.5), (0.5, 0.1, 0.1, 1.1)):
        told, naive = [], []
        for _ in range(200):
            truth = np.tile(1 + spread * generator.normal(size=12), 2)
            values = counts * (truth + noise * generator.normal(size=24))
            told.append(worst_domain(values, counts, domains) - truth.max())
            naive.append(max(by_domain(values, counts, domains).values()) - truth.max())
        assert np.sqrt(np.mean(np.square(told))) < share * np.sqrt(np.mean(np.square(naive)))
        assert abs(np.mean(told)) < close
    values = generator.normal(size=24)
    assert worst_domain(values, counts, ("one",) * 24) == pytest.approx(values.sum() / counts.sum())
    assert worst_domain(values, counts, tuple(map(str, range(24)))) == pytest.approx(values.sum() / counts.sum())


@pytest.mark.parametrize(("repaired", "best"), [(None, np.nan), (2.0, 2.0), (np.nan, np.nan)])
def test_a_repair_may_cure_an_overflow(repaired, best):
    candidate = Candidate("refined:0", (1,), 0.0, np.nan, np.nan, np.nan, 1, repaired)
    np.testing.assert_equal(candidate.best_loss, best)
