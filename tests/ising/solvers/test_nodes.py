import itertools

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most
from excise.ising.solvers import branch_and_bound
from excise.ising.solvers.branch_and_bound import TreeSearch
from excise.ising.solvers.exhaustive import Exhaustive
from excise.ising.solvers.nodes import Node
from excise.ising.solvers.semidefinite import Relaxation
from excise.ising.solvers.triangles import add_triangles, inner_products, no_triangles, schur, violated

from .campaign import is_right, lowest_one_by_one
from .problems import matrix


def node_with_states(seed, constrained=False):
    """A node of 9 units, two of them decided, and the energy of each of its states."""
    rng = np.random.default_rng(seed)
    kind = ("psd", "indefinite", "negative", "low rank", "degenerate", "tiny", "huge")[seed % 7]
    n, count = 9, 3 + seed % 4
    constraints = (at_most(range(0, n, 2), 4, n),) if constrained else ()
    problem = Problem(Energy(rng.standard_normal(n), matrix(kind, n, rng)), count, constraints=constraints)
    search = TreeSearch(problem.reduced(), 1, np.inf, 1)
    status = np.full(n, -1, np.int8)
    status[[2, 5]] = 1, 0
    energies = {}
    for removed in itertools.combinations(range(n), count):
        if problem.allows(removed):
            x = np.zeros(n, np.int8)
            x[list(removed)] = 1
            x = x[search.order]
            if x[2] == 1 and x[5] == 0:
                energies[tuple(x)] = problem.energy.energy(removed)
    return Node.of(search.instance, status, count), energies


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("seed", range(28))
def test_the_bound_with_triangles_holds_and_no_wanted_state_is_fixed_away(seed, constrained):
    node, energies = node_with_states(seed, constrained)
    ordered = sorted(energies.values())
    for limit in (ordered[0], ordered[len(ordered) // 4], ordered[-1]):
        gap = max(ordered[-1] - ordered[0], 1e-12)
        tight = node.tighten(no_triangles(), limit, 0.0, 0.01 * gap)
        assert tight.bound <= ordered[0] + 1e-12 * gap or tight.bound > limit >= ordered[0] - 1e-12 * gap
        if tight.bound > limit:
            assert ordered[0] >= limit
            continue
        Q, linear, offset = tight.minorant
        for x, energy in energies.items():
            values = np.array(x)[node.free]
            assert values @ Q @ values + linear @ values + offset <= energy + 1e-9 * gap
            if energy < limit:
                assert ((tight.verdict < 0) | (tight.verdict == values)).all()


def test_triangles_tighten_the_bound():
    rng = np.random.default_rng(3)
    n, count = 20, 10
    J = matrix("indefinite", n, rng)
    lowest = Exhaustive().solve(Problem(Energy(None, J), count), 1)[0].energy
    relaxation = Relaxation(J, np.zeros(n), count, np.zeros((0, n)), np.zeros(0))
    plain = relaxation.solve(relaxation.start(), no_triangles(), 1e-4, np.inf, 0.0)
    node = Node(np.arange(n), J, np.zeros(n), count, 0.0, np.zeros((0, n)), np.zeros(0))
    tight = node.tighten(no_triangles(), lowest, 0.0, 0.01 * (lowest - plain.value))
    assert plain.value < tight.bound <= lowest + 1e-9
    assert lowest - tight.bound < 0.5 * (lowest - plain.value)


def test_the_newton_system_equals_its_definition():
    rng = np.random.default_rng(0)
    p, m = 6, 5
    A, B = rng.standard_normal((2, p, p))
    Y, P = A @ A.T, B @ B.T
    cuts = violated(-np.ones((p, p)), 0.1, m)
    M = np.zeros((p + m, p + m))
    schur(Y, P, cuts.units, cuts.signs, M)
    parts = [np.diag(row) for row in np.eye(p)]
    for k in range(m):
        part = np.zeros((p, p))
        add_triangles(part, cuts.units[k : k + 1], cuts.signs[k : k + 1], np.ones(1))
        np.testing.assert_allclose(inner_products(Y, cuts.units, cuts.signs)[k], (part * Y).sum())
        parts.append(part)
    expected = [[np.trace(a @ Y @ b @ P) for b in parts] for a in parts]
    np.testing.assert_allclose(np.tril(M), np.tril(expected), rtol=1e-12, atol=1e-12)


def test_no_state_of_spins_violates_a_triangle():
    for s in itertools.product((-1.0, 1.0), repeat=5):
        assert len(violated(np.outer(s, s), 1e-9, 10)) == 0
    assert len(violated(-np.ones((3, 3)), 1e-9, 10)) == 1


@pytest.mark.parametrize("seed", range(6))
def test_deep_trees_bounded_one_by_one_equal_enumeration(seed):
    rng = np.random.default_rng(seed)
    n = 18
    constraints = (at_most(range(0, n, 2), 4, n),) if seed % 2 else ()
    J = matrix(("indefinite", "psd", "low rank")[seed % 3], n, rng)
    problem = Problem(Energy(rng.standard_normal(n), J), 7 + seed % 3, constraints=constraints)
    expected = [state.energy for state in Exhaustive().solve(problem, 30)]
    np.testing.assert_allclose(lowest_one_by_one(problem, 30, expected[-1]), expected, rtol=1e-9)


@pytest.mark.parametrize("start", range(0, 300, 60))
def test_random_problems_equal_enumeration_however_they_are_bounded(start):
    results = [is_right(seed) for seed in range(start, start + 60)]
    assert False not in results
    assert results.count(True) > 30


def test_threads_that_bound_nodes_have_no_blas_threads_besides(monkeypatch):
    seen = []
    A = np.random.default_rng(0).standard_normal((60, 30))
    problem = Problem(Energy(None, A.T @ A), 12)

    def bounded(self, thread, node):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return []

    for limit in ("FIRST_NODES", "TABLE_NODES", "NODES_PER_CALL"):
        monkeypatch.setattr(branch_and_bound, limit, 1)
    monkeypatch.setattr(branch_and_bound, "FAR", -1.0)
    monkeypatch.setattr(TreeSearch, "_bounded", bounded)
    with threadpool_limits(2, user_api="blas"):
        branch_and_bound.BranchAndBound(threads=2).solve(problem, 5)
    assert set(seen) == {1}
