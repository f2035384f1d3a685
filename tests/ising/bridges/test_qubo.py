"""QUBO and Ising models: energies preserved, and minima that are provably feasible."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.errors import InputError
from excise.ising.bridges.qubo import Ising, Qubo, safe_penalty, soft_penalty, to_ising, to_qubo
from excise.ising.bridges.repair import marginals, to_count
from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most


def every_vector(n):
    return np.array(list(itertools.product((0, 1), repeat=n)), dtype=np.int8).reshape(2**n, n)


def random_problem(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 9))
    A = random.standard_normal((n, n)) * 10.0 ** random.integers(-6, 4)
    J = [A + A.T, A @ A.T, np.diag(np.diag(A)), -A @ A.T, np.abs(A + A.T), np.zeros((n, n))][seed % 6]
    h = random.standard_normal(n) * np.abs(A).max() * float(random.integers(0, 4))
    budget = int(random.integers(1, n + 1))
    order = random.permutation(n).tolist()
    forced = order[: int(random.integers(0, min(budget, 2) + 1))]
    protected = order[len(forced) :][: int(random.integers(0, min(n - budget, 2) + 1))]
    return Problem(Energy(h, J), budget, protected=protected, forced=forced)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), penalty=st.sampled_from([None, 1e-3, 1.0, 50.0]))
def test_energy_is_preserved_wherever_the_budget_is_met(seed, penalty):
    problem = random_problem(seed)
    qubo, ising = to_qubo(problem, penalty), to_ising(problem, penalty)
    scale = np.abs(problem.energy.J).sum() + np.abs(problem.energy.h).sum() + qubo.penalty * (len(qubo.units) + 1) ** 2
    for x in every_vector(len(qubo.units)):
        spins = 2 * x - 1
        assert ising.energy(spins) == pytest.approx(qubo.energy(x), rel=0, abs=1e-13 * scale)
        if x.sum() == qubo.count:
            removed = qubo.decode(x)
            assert problem.allows(removed)
            assert ising.decode(spins) == removed
            assert qubo.energy(x) == pytest.approx(problem.energy.energy(removed), rel=0, abs=1e-13 * scale)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_minimum_under_the_safe_penalty_meets_the_budget(seed):
    qubo = to_qubo(random_problem(seed))
    vectors = every_vector(len(qubo.units))
    energies = np.array([qubo.energy(x) for x in vectors])
    feasible = vectors.sum(axis=1) == qubo.count
    if not feasible.all():
        assert energies[~feasible].min() > energies[feasible].min()


def test_a_penalty_is_needed_and_the_safe_one_is_far_below_the_sum_of_couplings():
    A = np.random.default_rng(0).standard_normal((40, 10))
    problem = Problem(Energy(None, A.T @ A / 40), 5)
    zero = to_qubo(problem, 1e-6)
    assert min(every_vector(10), key=zero.energy).sum() == 0
    assert safe_penalty(problem) < 0.1 * np.abs(problem.energy.J).sum()


def test_fixed_units_leave_the_model_and_their_energy_stays():
    problem = Problem(Energy([1.0, 2.0, 4.0, 8.0], np.ones((4, 4))), 2, protected=(0,), forced=(3,))
    qubo = to_qubo(problem)
    assert (qubo.units, qubo.forced, qubo.count) == ((1, 2), (3,), 1)
    assert qubo.decode([1, 0]) == (1, 3)
    assert qubo.energy([1, 0]) == pytest.approx(problem.energy.energy([1, 3]))


@pytest.mark.parametrize("seed", range(8))
def test_soft_is_the_median_of_the_cheapest_swaps_out_of_the_ground_state(seed):
    random = np.random.default_rng(seed)
    A = random.standard_normal((20, 8))
    problem = Problem(Energy(None, A.T @ A / 20), 4)
    states = {units: problem.energy.energy(units) for units in itertools.combinations(range(8), 4)}
    ground = min(states, key=states.__getitem__)
    cheapest = [
        min(energy for units, energy in states.items() if set(ground) - set(units) == {unit}) - states[ground]
        for unit in ground
    ]
    assert soft_penalty(problem) == pytest.approx(min(safe_penalty(problem), np.median(cheapest)))


@pytest.mark.parametrize("budget", [2, 4])
def test_soft_is_positive_where_no_swap_exists_or_costs(budget):
    problem = Problem(Energy(None, np.ones((4, 4))), budget)
    assert 0 < soft_penalty(problem) <= safe_penalty(problem)


def test_files_give_back_the_same_model(tmp_path):
    problem = random_problem(1001)
    qubo, ising = to_qubo(problem), to_ising(problem)
    qubo.save(tmp_path / "m.qubo")
    ising.save(tmp_path / "m.json")
    read, spins = Qubo.load(tmp_path / "m.qubo"), Ising.load(tmp_path / "m.json")
    np.testing.assert_array_equal(read.Q, qubo.Q)
    np.testing.assert_array_equal(spins.h, ising.h)
    np.testing.assert_array_equal(spins.J, ising.J)
    for name in ("offset", "units", "forced", "count", "penalty"):
        assert getattr(read, name) == getattr(qubo, name)
        assert getattr(spins, name) == getattr(ising, name)


def test_the_qubo_file_is_qbsolv_text(tmp_path):
    problem = Problem(Energy(None, [[1.0, 0.5], [0.5, 3.0]]), 1)
    to_qubo(problem, 2.0).save(tmp_path / "m.qubo")
    lines = [line for line in (tmp_path / "m.qubo").read_text().splitlines() if not line.startswith("c")]
    assert lines == ["p qubo 0 2 2 1", "0 0 -1.0", "1 1 1.0", "0 1 5.0"]


@pytest.mark.parametrize("text", ["", "c units 0 1\np qubo 0 2 2 0\n0 0 1.0\n", "p qubo 0 1 1 0\n0 0 x\n"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "m.qubo").write_text(text)
    with pytest.raises(InputError, match="file written by excise"):
        Qubo.load(tmp_path / "m.qubo")
    (tmp_path / "m.json").write_text('{"h": [1.0], "J": [[0]]}')
    with pytest.raises(InputError, match="not an Ising model"):
        Ising.load(tmp_path / "m.json")


def test_what_a_penalty_cannot_express_is_refused():
    energy = Energy(None, np.eye(4))
    with pytest.raises(InputError, match="at most 1 of"):
        to_qubo(Problem(energy, 2, constraints=(at_most([0, 1], 1, 4),)))
    with pytest.raises(InputError, match="needs a budget"):
        to_ising(Problem(energy, None))
    for penalty in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="penalty"):
            to_qubo(Problem(energy, 2), penalty)


@pytest.mark.parametrize("sample", [[1, 1, 0, 1], [0, 0, 0, 0], [1, 1], [1, 1, 2, 0]])
def test_a_sample_that_is_no_state_is_refused(sample):
    with pytest.raises(InputError):
        to_qubo(Problem(Energy(None, np.eye(4)), 2)).decode(sample)


@pytest.mark.parametrize("seed", range(5))
def test_repair_makes_the_best_single_flip_each_time(seed):
    random = np.random.default_rng(seed)
    J = random.standard_normal((7, 7))
    problem = Problem(Energy(random.standard_normal(7), J + J.T), 3)
    reduced = problem.reduced()
    for start in every_vector(7):
        x, expected = to_count(reduced, start), start.copy()
        while expected.sum() != 3:
            flips = np.flatnonzero(expected == (expected.sum() > 3))
            options = [expected ^ np.eye(7, dtype=np.int8)[k] for k in flips]
            expected = min(options, key=lambda y: problem.energy.energy(np.flatnonzero(y)))
        np.testing.assert_array_equal(x, expected)


def test_marginals_are_differences_of_energy():
    problem = random_problem(3)
    reduced = Problem(problem.energy, problem.budget).reduced()
    x = np.zeros(len(reduced.h), dtype=np.int8)
    x[::2] = 1
    for i, c in enumerate(marginals(reduced, x)):
        with_i, without = {*np.flatnonzero(x).tolist(), i}, set(np.flatnonzero(x).tolist()) - {i}
        assert c == pytest.approx(problem.energy.energy(with_i) - problem.energy.energy(without))
