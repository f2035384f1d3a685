"""Intervals against their definitions, and by how often they hold."""

import numpy as np
import pytest

from excise.evaluation.intervals import ERRORS, paired_difference, quantiles, resampled, wilson


@pytest.mark.parametrize(("passed", "asked"), [(0, 3), (3, 3), (1, 12), (7, 24), (50, 100)])
def test_the_ends_of_wilsons_interval_are_where_the_rate_is_just_not_rejected(passed, asked):
    rate = passed / asked
    for end in wilson(passed, asked):
        # |rate − p| = z √(p(1 − p)/n), which defines the interval; 0 and 1 are ends by themselves.
        assert abs(rate - end) == pytest.approx(ERRORS * np.sqrt(end * (1 - end) / asked), abs=1e-7)


def test_equal_pairs_leave_room_for_a_difference_and_less_of_it_the_more_they_are():
    widths = []
    for items in (4, 40, 400):
        same = np.arange(items) % 2 == 0
        low, high = paired_difference(same, same)
        assert low < 0 < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < 0.05


def test_it_turns_round_with_the_pair_and_nears_the_bootstrap_where_there_are_many():
    generator = np.random.default_rng(1)
    first = generator.random(600) < 0.7
    second = np.where(generator.random(600) < 0.8, first, generator.random(600) < 0.3)
    low, high = paired_difference(first, second)
    assert paired_difference(second, first) == pytest.approx((-high, -low))
    excess = first.astype(float) - second
    assert (low, high) == pytest.approx(quantiles(resampled(excess, np.ones(600))), abs=0.01)


def test_paired_intervals_hold_in_19_of_20_cases():
    generator, held = np.random.default_rng(0), 0
    for _ in range(2000):
        first = generator.random(20) < 0.6
        second = np.where(generator.random(20) < 0.5, first, generator.random(20) < 0.4)
        low, high = paired_difference(first, second)
        held += low <= 0.6 - (0.5 * 0.6 + 0.5 * 0.4) <= high
    assert 0.93 < held / 2000 < 0.99


def test_resamples_are_ratios_of_sums_and_the_same_for_all():
    values, weights = np.array([1.0, 4.0, 2.0]), np.array([1.0, 2.0, 1.0])
    counts = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), 10_000)
    expected = [(c * values).sum() / (c * weights).sum() for c in counts[:50]]
    assert resampled(values, weights)[:50] == pytest.approx(expected)
    assert quantiles(resampled(values, weights) - resampled(values, weights)) == (0, 0)


def test_a_replicate_without_weight_counts_for_nothing():
    low, high = quantiles(resampled(np.array([0.0, 3.0]), np.array([0.0, 1.0])))
    assert (low, high) == (3, 3)
