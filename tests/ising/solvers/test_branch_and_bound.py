import itertools
import signal
import threading

import numpy as np
import pytest

from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most, weigh_at_least
from excise.ising.solvers import solve, solve_all
from excise.ising.solvers.base import Deadline
from excise.ising.solvers.bound import best_shift, make_valid
from excise.ising.solvers.branch_and_bound import BranchAndBound, Run, TreeSearch
from excise.ising.solvers.exhaustive import Exhaustive

from .problems import assert_same_list, matrix, random_problem


def hard_energy(n, seed=0, samples=2):
    """Correlations of both signs and a lowest energy far below the trace, as real gradients give."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * np.exp(rng.normal(0, 0.7, n))
    A = rng.standard_normal((samples * n, n)) @ mixing
    return Energy(None, A.T @ A / len(A))


def glass(n=100):
    """A spin glass (random signs everywhere), far beyond proof in a second."""
    return Energy(None, matrix("indefinite", n, np.random.default_rng(9)))


def pairs(spectrum):
    return [(state.energy, state.removed) for state in spectrum]


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_random_problems_equal_enumeration(start):
    compared = 0
    for seed in range(start, start + 250):
        problem = random_problem(seed)
        if problem is None:
            continue
        states = (1, 4, 20, 100)[seed // 10 % 4]
        expected = Exhaustive().solve(problem, states)
        found = BranchAndBound(restarts=1 + seed % 3, threads=1 + seed % 2).solve(problem, states)
        assert found.certified
        assert found.complete == expected.complete
        assert_same_list(found, pairs(expected), problem)
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("seed", range(12))
def test_deeper_trees_equal_enumeration(seed):
    constraints = () if seed % 2 else (at_most(range(0, 20, 2), 4, 20), weigh_at_least(np.arange(20) % 7, 18))
    problem = Problem(hard_energy(20, seed), 6 + seed % 8, forced=(seed,), constraints=constraints)
    found = BranchAndBound(restarts=2).solve(problem, 50)
    assert found.certified
    assert_same_list(found, pairs(Exhaustive().solve(problem, 50)), problem)


@pytest.mark.parametrize("kind", ["psd", "indefinite"])
def test_deep_search_uses_the_shifts_of_the_tails(kind):
    J = matrix(kind, 26, np.random.default_rng(4))
    problem = Problem(Energy(None, J), 13)
    search = TreeSearch(problem.reduced(), 30, np.inf, 1)
    search.prepare(np.full(26, 0.5))
    search._fill_tables(0)
    search.run(Deadline())
    assert search.open_bound() == np.inf
    assert (search.instance.which > 0).any()
    expected = Exhaustive().solve(problem, 30)
    energies = sorted(problem.energy.energies(np.flatnonzero(mask) for mask in search.masks()))
    np.testing.assert_allclose(energies[:30], [s.energy for s in expected], rtol=1e-12)


def test_a_wrong_threshold_cannot_be_proved():
    # A threshold below the truth, as a faulty heuristic would give: the search meets too few states and says so.
    problem = Problem(hard_energy(16), 8)
    run = Run(problem, 10, Deadline(), threads=1, seed=0)
    run.find_threshold(restarts=2)
    run.threshold *= 0.5
    run.prove()
    spectrum = run.spectrum("branch-and-bound")
    assert not spectrum.certified
    assert "fewer states" in spectrum.notes[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["psd", "indefinite", "negative", "low rank", "zero"])
def test_shift_is_valid_and_its_bound_holds(kind, seed):
    rng = np.random.default_rng(seed)
    n, count = 10, 2 + seed % 7
    J, h = matrix(kind, n, rng), rng.standard_normal(n)
    shift = best_shift(J, h, count, tolerance=1e-3)
    basis = np.linalg.qr(np.c_[np.ones(n), rng.standard_normal((n, n - 1))])[0][:, 1:]
    shifted = J - np.diag(shift.u)
    assert np.linalg.eigvalsh(basis.T @ shifted @ basis)[0] >= -1e-12 * np.abs(J).max()
    lowest = Exhaustive().solve(Problem(Energy(h, J), count), 1)[0].energy
    gradient = 2 * shifted @ shift.y + h + shift.u
    value = shift.y @ shifted @ shift.y + (h + shift.u) @ shift.y
    assert value + np.sort(gradient)[:count].sum() - gradient @ shift.y <= lowest + 1e-9


def test_an_invalid_shift_is_made_valid():
    J = matrix("indefinite", 8, np.random.default_rng(0))
    u = make_valid(J, np.full(8, 50.0))
    basis = np.linalg.qr(np.c_[np.ones(8), np.eye(8)[:, :7]])[0][:, 1:]
    assert np.linalg.eigvalsh(basis.T @ (J - np.diag(u)) @ basis)[0] >= 0


@pytest.mark.parametrize("constrained", [False, True])
def test_out_of_time_gives_a_true_bound_and_says_so(constrained):
    constraints = (at_most(range(0, 100, 2), 20, 100),) if constrained else ()
    problem = Problem(glass(), 50, constraints=constraints)
    spectrum = solve(problem, time_limit=1.5)
    assert not spectrum.certified
    assert "time limit" in spectrum.notes[-1]
    assert spectrum.lower_bound <= spectrum[0].energy
    assert 0 < spectrum.gap < np.inf
    assert len(spectrum) == 20
    assert spectrum.proved < 20


def test_bound_and_proved_states_are_right_when_cut_short():
    problem = Problem(hard_energy(24, seed=3, samples=1), 12)
    truth = Exhaustive().solve(problem, 200)
    run = Run(problem, 200, Deadline(), threads=1, seed=0)
    run.find_threshold(restarts=5)
    search = TreeSearch(problem.reduced(), 200, run.threshold, 1)
    search.prepare(run._typical(12))
    search.staged = True
    bounds = []
    for _ in range(30):
        search._expand(0, 20)
        bounds.append(search.open_bound())
    assert (np.diff(bounds) >= 0).all()
    run.open_bounds = {12: bounds[-1]}
    spectrum = run.spectrum("branch-and-bound")
    assert spectrum.lower_bound <= truth[0].energy
    assert spectrum.states[: spectrum.proved] == truth.states[: spectrum.proved]


def test_interrupt_returns_what_is_known():
    import _thread

    problem = Problem(glass(), 50)
    solve(Problem(hard_energy(14), 7), solver="branch-and-bound")  # compiled before the clock starts
    timer = threading.Timer(1.0, _thread.interrupt_main)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        timer.start()
        spectrum = BranchAndBound().solve(problem, 20)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not spectrum.certified
    assert "interrupted" in spectrum.notes[-1]
    assert len(spectrum) == 20


@pytest.mark.parametrize("J", [np.zeros((40, 40)), np.eye(40), np.ones((40, 40)), np.diag(np.arange(40) // 30 + 1.0)])
def test_many_ties_end_and_are_reported(J):
    problem = Problem(Energy(None, J), 20)
    spectrum = BranchAndBound().solve(problem, 5)
    assert spectrum.certified
    assert "tie" in spectrum.notes[0]
    assert [s.energy for s in spectrum] == [spectrum[0].energy] * 5


def test_more_states_than_exist():
    spectrum = BranchAndBound().solve(Problem(hard_energy(7), 3), 1000)
    assert [s.removed for s in sorted(spectrum, key=lambda s: s.removed)] == list(itertools.combinations(range(7), 3))
    assert spectrum.complete


def test_all_budgets_equal_one_by_one():
    problem = Problem(hard_energy(22, seed=5), 1, protected=(0,), forced=(3,))
    spectra = solve_all(problem, [2, 5, 6, 9, 10, 11, 20], states=30)
    assert list(spectra) == [2, 5, 6, 9, 10, 11, 20]
    for budget, spectrum in spectra.items():
        single = solve(Problem(problem.energy, budget, (0,), (3,)), states=30)
        assert spectrum.certified
        assert spectrum.budget == budget
        assert spectrum.states == single.states


def test_all_budgets_with_distance_and_another_solver():
    problem = Problem(hard_energy(12), 1)
    for arguments in ({"min_distance": 4}, {"solver": "tabu"}):
        spectra = solve_all(problem, [6, 3], states=5, **arguments)
        assert list(spectra) == [3, 6]
        for budget, spectrum in spectra.items():
            assert spectrum.states == solve(Problem(problem.energy, budget), states=5, **arguments).states


def test_a_failure_in_a_search_thread_is_raised_not_told_as_a_time_limit(monkeypatch):
    def fail(self, thread, nodes):
        raise ZeroDivisionError("in a thread")

    monkeypatch.setattr(TreeSearch, "_expand", fail)
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        BranchAndBound(threads=2).solve(Problem(hard_energy(20), 10), 5)
