"""An energy, its lowest states, and candidates measured beside it."""

import numpy as np
import pytest

from excise.choosing.verify import Candidate, Verified
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import solve


@pytest.fixture
def energy():
    factor = np.random.default_rng(0).normal(size=(40, 8))
    return Energy(None, factor.T @ factor / 40, source={"kind": "fisher"})


@pytest.fixture
def spectrum(energy):
    return solve(Problem(energy, 3), states=20)


@pytest.fixture
def verified(energy):
    removals = [("fisher:0", (0, 1, 2)), ("norm-ratio", (1, 2, 3)), ("random:0", (2, 5, 7)), ("random:1", (0, 4, 6))]
    candidates = [
        Candidate(method, removed, energy.energy(removed), 3.0 + i, 1.0 + i, float(np.exp(3 + i)), 70)
        for i, (method, removed) in enumerate(removals)
    ]
    broken = Candidate("fisher:1", (5, 6, 7), 0.1, float("inf"), float("inf"), float("inf"), 70)
    return Verified(2.0, (*candidates, broken), 0.5, 100.0)
