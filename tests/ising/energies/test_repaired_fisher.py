"""The energy after a repair of the gates: the Schur complement, and what a minimisation that knows no formula finds."""

import numpy as np
import pytest
from scipy.optimize import minimize

from excise.errors import InputError
from excise.ising.energies import fisher
from excise.ising.energies.repaired_fisher import RepairedFisher

A = np.random.default_rng(0).normal(size=(40, 6))
OWNERS = (0, 0, 1, 1, 2, 2)
RIDGE = 0.2
H = A.T @ A / len(A)
DAMPED = H + RIDGE * np.trace(H) / 6 * np.eye(6)


@pytest.mark.parametrize("removed", [(0,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_it_is_the_schur_complement_and_the_least_that_kept_gates_can_reach(removed):
    gone = [gate for gate, owner in enumerate(OWNERS) if owner in removed]
    kept = [gate for gate in range(6) if gate not in gone]
    ones = np.ones(len(gone))
    schur = DAMPED[np.ix_(gone, gone)]
    if kept:
        moved = np.linalg.solve(DAMPED[np.ix_(kept, kept)], DAMPED[np.ix_(kept, gone)])
        schur = schur - DAMPED[np.ix_(gone, kept)] @ moved
    energy = RepairedFisher.of(A, OWNERS, RIDGE)
    assert energy.energies([removed])[0] == pytest.approx(ones @ schur @ ones)
    gains = energy.gains(removed)
    np.testing.assert_allclose(gains[gone], 0, atol=1e-12)

    def loss(moves):
        change = np.zeros(6)
        change[gone], change[kept] = -1, moves
        return change @ DAMPED @ change

    if kept:
        found = minimize(loss, np.zeros(len(kept)), tol=1e-12)
        assert energy.energies([removed])[0] == pytest.approx(found.fun, rel=1e-6)
        np.testing.assert_allclose(gains[kept] - 1, found.x, atol=1e-4)


def test_a_large_ridge_forbids_gates_to_move():
    columns = A[:, ::2]
    ridge = 1e9
    shift = ridge * np.trace(fisher(columns).J) / 3
    free = RepairedFisher.of(columns, None, ridge)
    assert free.energies([(0, 2)])[0] - 2 * shift == pytest.approx(fisher(columns).energy((0, 2)), rel=1e-3)
    np.testing.assert_allclose(free.gains((0, 2)), [0, 1, 0], atol=1e-6)


def test_nothing_removed_costs_nothing():
    assert RepairedFisher.of(A).energies([()]) == [0.0]


@pytest.mark.parametrize(
    ("gradients", "owners", "ridge"), [(A, (0, 1), 0.1), (A, None, 0.0), (np.zeros((3, 2)), None, 0.1)]
)
def test_what_has_no_inverse_is_refused(gradients, owners, ridge):
    with pytest.raises(InputError, match="expected a unit for each of"):
        RepairedFisher.of(gradients, owners, ridge)
