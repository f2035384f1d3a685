import json
import math
import random

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import ENERGIES, Energy, fisher, fisher_linear


def naive_energy(energy, removed):
    x = np.zeros(len(energy))
    x[list(removed)] = 1.0
    return float(energy.h @ x + x @ energy.J @ x)


def random_energy(n=9, seed=0):
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((n, n))
    return Energy(rng.standard_normal(n), J + J.T)


def test_energy_is_the_quadratic_form_and_ignores_the_order_of_removal():
    energy = random_energy()
    shuffler = random.Random(0)
    for size in range(10):
        removed = shuffler.sample(range(9), size)
        assert energy.energy(removed) == pytest.approx(naive_energy(energy, removed), abs=1e-12)
        assert energy.energy(removed) == energy.energy(sorted(removed)) == energy.energy(reversed(removed))


def test_energies_of_states_of_several_sizes_equal_one_by_one():
    energy = random_energy(seed=1)
    states = [(0,), (3, 1), (), (2, 8, 4), (5, 6), tuple(range(9))]
    assert energy.energies(states) == [energy.energy(state) for state in states]


def test_energy_is_correctly_rounded():
    energy = Energy([1e16, 1.0, -1e16], np.zeros((3, 3)))
    assert energy.energy([0, 1, 2]) == 1.0


@pytest.mark.parametrize(
    ("h", "J", "message"),
    [
        (None, np.zeros((2, 3)), "square"),
        (None, np.zeros(4), "square"),
        (None, np.zeros((0, 0)), "N = 0"),
        (None, [[1.0, np.nan], [0.0, 1.0]], r"J\[0,1\]"),
        (None, [[1.0, 2.0], [0.0, 1.0]], "symmetric"),
        ([1.0], np.eye(2), "shape"),
        ([1.0, np.inf], np.eye(2), r"h\[1\]"),
        (None, [["a"]], "real numbers"),
        (None, [[1.0, 2.0], [3.0]], "real numbers"),
    ],
)
def test_bad_input_is_named(h, J, message):
    with pytest.raises(InputError, match=message):
        Energy(h, J)


def test_slight_asymmetry_is_symmetrised_with_a_note():
    J = np.eye(3)
    J[0, 1] = 1e-8
    with pytest.warns(UserWarning, match="symmetrised"):
        energy = Energy(None, J)
    assert (energy.J == energy.J.T).all()
    assert energy.J[0, 1] == 0.5e-8


def test_wrong_number_of_labels():
    with pytest.raises(InputError, match="3 labels"):
        Energy(None, np.eye(3), labels=["a"])


def test_caller_cannot_change_an_energy():
    J = np.eye(2)
    energy = Energy(None, J)
    J[0, 0] = 5
    assert energy.energy([0]) == 1.0
    with pytest.raises(ValueError, match="read-only"):
        energy.J[0, 0] = 2


def test_restrict_keeps_energies_and_labels():
    energy = Energy(*(lambda e: (e.h, e.J))(random_energy()), labels=[f"block {i}" for i in range(9)])
    part = energy.restrict([7, 2, 4])
    assert part.labels == ("block 7", "block 2", "block 4")
    assert part.energy([0, 2]) == pytest.approx(energy.energy([7, 4]), rel=1e-15)


def test_safetensors_round_trip(tmp_path):
    energy = Energy([1.0, 2.0], [[3.0, 0.1], [0.1, 4.0]], labels=["a", "ß"], source={"kind": "fisher", "samples": 8})
    energy.save(tmp_path / "energy.safetensors")
    loaded = Energy.load(tmp_path / "energy.safetensors")
    assert (loaded.h == energy.h).all()
    assert (loaded.J == energy.J).all()
    assert loaded.labels == energy.labels
    assert loaded.source == energy.source
    assert json.dumps(loaded.source)


def test_plain_matrices_load(tmp_path):
    H = np.array([[2.0, 1.0], [1.0, 3.0]])
    np.save(tmp_path / "H.npy", H)
    np.savez(tmp_path / "both.npz", H=H, h=[1.0, -1.0])
    assert Energy.load(tmp_path / "H.npy").energy([0, 1]) == 7.0
    assert Energy.load(tmp_path / "both.npz").energy([0, 1]) == 7.0
    assert Energy.load(tmp_path / "both.npz").energy([1]) == 2.0


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "H.npy").write_bytes(b"not a matrix")
    (tmp_path / "H.safetensors").write_bytes(b"short")
    np.savez(tmp_path / "H.npz", other=np.eye(2))
    for name, message in [
        ("H.npy", "cannot be read as a NumPy file"),
        ("H.safetensors", "safetensors"),
        ("H.npz", "holds"),
        ("none.npy", "no file"),
    ]:
        with pytest.raises(InputError, match=message):
            Energy.load(tmp_path / name)


def test_correlation_is_safe_where_the_diagonal_is_not_positive():
    energy = Energy(None, [[4.0, 2.0, 1.0], [2.0, 9.0, 1.0], [1.0, 1.0, 0.0]])
    correlation = energy.correlation()
    assert correlation[0, 1] == pytest.approx(2 / 6)
    assert correlation[2].tolist() == [0.0, 0.0, 1.0]


def test_correlation_is_on_the_scale_of_what_each_costs_alone():
    """An energy whose diagonal is in h, as a fitted one has it, correlates as the one that has it in J."""
    J = np.array([[4.0, 2.0, -1.5], [2.0, 9.0, 1.0], [-1.5, 1.0, 1.0]])
    in_h = Energy(np.diag(J), J - np.diag(np.diag(J)))
    alone = [in_h.energy([i]) for i in range(3)]
    naive = [[1.0 if i == j else J[i, j] / math.sqrt(alone[i] * alone[j]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(in_h.correlation(), naive)
    np.testing.assert_allclose(Energy(None, J).correlation(), naive)


def test_fisher_is_the_second_moment_of_the_gradients():
    A = np.random.default_rng(0).standard_normal((40, 5))
    energy = fisher(A, labels="abcde")
    expected = sum(np.outer(row, row) for row in A) / 40
    np.testing.assert_allclose(energy.J, expected, rtol=1e-13)
    assert not energy.h.any()
    assert energy.labels == tuple("abcde")
    assert energy.source == {"kind": "fisher", "samples": 40, "rank": 5}


def test_fisher_linear_predicts_the_loss_of_a_quadratic_model():
    rng = np.random.default_rng(1)
    A = rng.standard_normal((60, 6))
    energy = fisher_linear(A)
    gradient, hessian = A.mean(axis=0), A.T @ A / 60
    for removed in [(0,), (1, 4), (0, 2, 3, 5)]:
        step = np.zeros(6)
        step[list(removed)] = -1.0  # gates go from 1 to 0
        taylor = gradient @ step + step @ hessian @ step / 2
        assert energy.energy(removed) == pytest.approx(taylor, rel=1e-12)


@pytest.mark.parametrize(("samples", "message"), [(5, "rank 5 for 8 units"), (20, "20 samples for 8 units")])
def test_too_few_samples_warn_with_numbers(samples, message):
    A = np.random.default_rng(0).standard_normal((samples, 8))
    with pytest.warns(UserWarning, match=message):
        fisher(A)


def test_gradients_that_are_not_finite_are_named():
    A = np.ones((4, 2))
    A[2, 1] = math.nan
    with pytest.raises(InputError, match="row 2"):
        fisher(A)
    with pytest.raises(InputError, match="shape"):
        fisher(np.ones(3))


def test_every_energy_by_name_takes_gradients_and_labels():
    A = np.random.default_rng(0).standard_normal((12, 3))
    for make in ENERGIES.values():
        assert make(A, labels=["x", "y", "z"]).labels == ("x", "y", "z")
