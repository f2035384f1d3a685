"""The arithmetic of a draft, and what is measured for it."""

import numpy as np
import pytest
from benchmarks.draft import acceptance, expected_speedup

from tests.choosing.criteria.naive import rejection, without
from tests.random_samples import random_samples
from tests.tiny import tiny_model


@pytest.mark.parametrize(("a", "k", "c"), [(0.3, 1, 0.2), (0.8, 4, 0.1), (0.95, 9, 0.5)])
def test_the_sum_is_the_closed_form(a, k, c):
    assert expected_speedup(a, k, c) == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + 1)))


def test_a_draft_pays_only_if_it_is_accepted_more_often_than_it_costs():
    for cost in np.linspace(0.05, 0.95, 10):
        assert expected_speedup(cost + 0.01, 1, cost) > 1
        assert max(expected_speedup(cost, k, cost) for k in range(1, 30)) <= 1 + 1e-12


def test_acceptance_is_what_is_not_rejected():
    target, samples = tiny_model("llama", 3), random_samples()
    draft = without(target, (1,))
    found = acceptance(target, draft, samples)
    assert found["acceptance"] == pytest.approx(1 - rejection(target, draft, samples))
    assert 0 < found["acceptance_error"] < 1
    assert acceptance(target, target, samples)["top1"] == 1
