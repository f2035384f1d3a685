"""The table of problems that every solver must pass, and random problems for property tests."""

import itertools

import numpy as np

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.pattern import Pattern
from excise.ising.problem import Problem, at_most, weigh_at_least, weigh_at_most


def every_state(problem):
    """(energy, removed) of every allowed state, sorted, by the naive definition."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(problem.energy)), m) for m in problem.counts()
    )
    allowed = [units for units in subsets if problem.allows(units)]
    return sorted(zip(problem.energy.energies(allowed), allowed, strict=True))


def matrix(kind, n, rng):
    A = rng.standard_normal((n, n))
    low_rank = A[:, : max(1, n // 3)]
    J = {
        "zero": lambda: np.zeros((n, n)),
        "diagonal": lambda: np.diag(A[0]),
        "degenerate": lambda: np.round(A + A.T),
        "rank one": lambda: np.outer(A[0], A[0]),
        "low rank": lambda: low_rank @ low_rank.T,
        "psd": lambda: A @ A.T,
        "negative": lambda: -A @ A.T,
        "indefinite": lambda: A + A.T,
        "tiny": lambda: 1e-9 * (A @ A.T),
        "huge": lambda: 1e9 * (A + A.T),
    }[kind]()
    return (J + J.T) / 2


KINDS = ("zero", "diagonal", "degenerate", "rank one", "low rank", "psd", "negative", "indefinite", "tiny", "huge")


def pattern_of_kinds(kinds, places):
    """Units of some kinds may stay only at the places of these kinds, which repeat."""
    return Pattern(tuple(tuple(kind == place for place in places) for kind in kinds))


def table():
    rng = np.random.default_rng(0)
    n = 11
    problems = {kind: Problem(Energy(None, matrix(kind, n, rng)), 5) for kind in KINDS}
    energy = Energy(rng.standard_normal(n), matrix("psd", n, rng))
    weights = rng.integers(1, 9, n)
    problems |= {
        "linear term": Problem(energy, 4),
        "only linear": Problem(Energy(rng.standard_normal(n), np.zeros((n, n))), 4),
        "M = 1": Problem(energy, 1),
        "M = N − 1": Problem(energy, n - 1),
        "M = N": Problem(energy, n),
        "N = 1": Problem(Energy([1.0], [[2.0]]), 1),
        "N = 2": Problem(Energy([1.0, -1.0], np.eye(2)), 1),
        "protected": Problem(energy, 5, protected=(0, 1, -1)),
        "forced": Problem(energy, 5, forced=(2, 7)),
        "protected and forced": Problem(energy, 6, protected=(0, -1), forced=(3, 4)),
        "all forced": Problem(energy, 2, forced=(3, 4)),
        "kinds": Problem(energy, 5, constraints=(at_most(range(0, n, 2), 2, n), at_most([1, 3], 1, n))),
        "weighted": Problem(energy, None, constraints=(weigh_at_least(weights, 0.4 * weights.sum()),)),
        "weighted between": Problem(
            energy, None, constraints=(weigh_at_least(weights, 20), weigh_at_most(weights, 20 + weights.max()))
        ),
        "weighted, forced, kinds": Problem(
            energy,
            None,
            protected=(0,),
            forced=(5,),
            constraints=(weigh_at_least(weights, 0.3 * weights.sum()), at_most(range(6), 3, n)),
        ),
        "weighted with a budget": Problem(energy, 4, constraints=(weigh_at_least(weights, 0.45 * weights.sum()),)),
    }
    alternating = pattern_of_kinds("ab" * 6, "ab")
    energy = Energy(rng.standard_normal(12), matrix("psd", 12, rng))
    problems |= {
        "alternating": Problem(energy, 4, pattern=alternating),
        "alternating, an odd number": Problem(energy, 5, pattern=alternating),
        "alternating, protected and forced": Problem(energy, 6, (0, 6, -1), (2, 3), pattern=alternating),
        "alternating, all fixed": Problem(energy, 2, tuple(range(2, 12)), (0, 1), pattern=alternating),
        "the last of three": Problem(energy, 6, pattern=pattern_of_kinds("aab" * 4, "aab")),
        "a pattern not in the original": Problem(energy, 3, pattern=pattern_of_kinds("aabaabaabbba", "aab")),
        "two patterns": Problem(energy, 6, pattern=alternating.both(pattern_of_kinds("ccd" * 4, "ccd"))),
        "alternating, without a budget": Problem(
            energy, None, (3,), constraints=(weigh_at_least(np.ones(12), 3),), pattern=alternating
        ),
        "alternating, kinds": Problem(energy, 6, constraints=(at_most(range(4), 2, 12),), pattern=alternating),
    }
    return problems


def random_pattern(seed, largest=14):
    """A problem of any kind in which what stays must keep a pattern, or None where nothing does."""
    rng = np.random.default_rng(seed)
    n, period = int(rng.integers(1, largest + 1)), int(rng.integers(1, 6))
    places = rng.integers(0, 2, period)
    kinds = rng.integers(0, 2, n) if rng.random() < 0.2 else np.resize(places, n)
    J = matrix(KINDS[seed % len(KINDS)], n, rng)
    units = rng.permutation(n)
    fixed = int(rng.integers(0, max(1, n // 2)))
    protected, forced = units[: fixed // 2], units[fixed // 2 : fixed]
    budget = int(rng.integers(max(1, len(forced)), n - len(protected) + 1)) if rng.random() < 0.8 else None
    few = at_most(rng.permutation(n)[: max(1, n // 2)], int(rng.integers(0, n)), n)
    constraints = (few,) if rng.random() < 0.3 else ()
    energy = Energy(rng.standard_normal(n) * (np.abs(J).max() or 1.0), J)
    try:
        return Problem(energy, budget, protected, forced, constraints, pattern_of_kinds(kinds, places))
    except InputError:
        return None


def random_problem(seed, largest=14):
    """A problem of any kind, or None where its random constraints have no solution."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, largest + 1))
    J = matrix(KINDS[seed % len(KINDS)], n, rng)
    h = rng.standard_normal(n) * (np.abs(J).max() or 1.0) * rng.integers(0, 2)
    units = rng.permutation(n)
    fixed = int(rng.integers(0, max(1, n // 2)))
    protected, forced = units[: fixed // 2], units[fixed // 2 : fixed]
    fewest, most = max(1, len(forced)), n - len(protected)
    budget = int(rng.choice([fewest, most, max(fewest, most - 1), rng.integers(fewest, most + 1)]))
    constraints = []
    if rng.random() < 0.4:
        weights = rng.integers(0, 9, n) if seed % 3 else rng.random(n)
        constraints.append(weigh_at_least(weights, float(rng.uniform(0, 1.2)) * weights.sum() * budget / n))
    if rng.random() < 0.4:
        constraints.append(at_most(rng.permutation(n)[: max(1, n // 2)], int(rng.integers(0, budget + 1)), n))
    try:
        free_budget = bool(constraints) and rng.random() < 0.3
        return Problem(Energy(h, J), None if free_budget else budget, protected, forced, constraints)
    except InputError:
        return None


def assert_same_list(found, expected, problem):
    """Equal lists, up to the choice among states that tie with the last one within rounding."""
    tolerance = 1e-10 * float(np.abs(problem.energy.J).sum() + np.abs(problem.energy.h).sum())
    assert len(found) == len(expected)
    np.testing.assert_allclose([s.energy for s in found], [energy for energy, _ in expected], rtol=0, atol=tolerance)
    if expected:
        last = expected[-1][0] - tolerance
        assert [s.removed for s in found if s.energy < last] == [units for energy, units in expected if energy < last]
