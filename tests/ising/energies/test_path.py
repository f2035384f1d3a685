"""The path energy on planted quadratic damages, clean and with heavy tails."""

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies.path import path, path_positions

N, SAMPLES = 10, 200


def planted(seed):
    generator = np.random.default_rng(seed)
    h, d, J = generator.gamma(2, 0.2, N), generator.normal(0, 0.1, N), generator.normal(0, 0.05, (N, N))
    J = (J + J.T) / 2
    np.fill_diagonal(J, 0)
    return h, d, J


def gradients(h, d, J, at):
    """∂L/∂α = −∂/∂y (hᵀy + dᵀy² + yᵀJy)."""
    return -(h + 2 * d * at + 2 * at @ J)


def test_recovers_a_quadratic_damage():
    h, d, J = planted(0)
    at = path_positions(N, SAMPLES, [4], seed=1)
    energy = path(gradients(h, d, J, at), at)
    np.testing.assert_allclose(energy.J, J, atol=0.01)
    np.testing.assert_allclose(energy.h, h + d, atol=0.02)


def test_heavy_tails_do_not_spoil_it():
    h, d, J = planted(1)
    at = path_positions(N, SAMPLES, [4], seed=1)
    generator = np.random.default_rng(2)
    noise = 0.02 * generator.standard_normal((SAMPLES, N))
    noise[generator.random((SAMPLES, N)) < 0.05] *= 200
    energy = path(gradients(h, d, J, at) + noise, at)
    masks = (generator.random((300, N)) < 0.4).astype(float)
    truth = masks @ (h + d) + np.einsum("ni,ij,nj->n", masks, J, masks)
    found = masks @ energy.h + np.einsum("ni,ij,nj->n", masks, energy.J, masks)
    assert np.corrcoef(truth, found)[0, 1] > 0.99


def test_positions_are_stratified_subsets_of_about_the_budget():
    at = path_positions(20, 64, [5, 9], seed=3)
    depths = at.max(axis=1)
    assert sorted((depths * 64).astype(int)) == list(range(64))
    assert ((at == 0) | np.isclose(at, depths[:, None])).all()
    assert set((at > 0).sum(axis=1)) <= set(range(3, 12))
    np.testing.assert_array_equal(at, path_positions(20, 64, [5, 9], seed=3))


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match=r"got shapes \(4, 3\) and \(4, 2\)"):
        path(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(InputError, match="finite"):
        path(np.full((2, 2), np.nan), np.zeros((2, 2)))
