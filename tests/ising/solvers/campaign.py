"""Random small problems solved by branch-and-bound against enumeration, in numbers.

`python -m tests.ising.solvers.campaign [--problems 100000] [--start 0]` prints one JSON line: problems compared, and
the seeds of those that came out wrong. Indefinite, low-rank, tied, constrained and patterned problems of a few units,
half of them with every node bounded by the semidefinite relaxation, which small problems never need.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np

from excise.errors import InputError
from excise.ising.problem import Problem
from excise.ising.solvers.base import Deadline
from excise.ising.solvers.branch_and_bound import BranchAndBound, TreeSearch
from excise.ising.solvers.exhaustive import Exhaustive

from .problems import pattern_of_kinds, random_problem

STATES = (1, 4, 20, 60)
OWN_GAPS = (0.0, 0.5, 2.0)


def lowest_one_by_one(problem: Problem, states: int, threshold: float, own_gap: float = 0.0) -> list[float]:
    """Energies up to the threshold, ascending, from a tree in which every node is bounded by itself.

    Nodes that this leaves less than `own_gap` of the root's gap are searched under their own functions, a few nodes
    at a time.
    """
    found: set[tuple[int, ...]] = set()
    for count in problem.counts():
        search = TreeSearch(problem.reduced(count), states, threshold, threads=1)
        search.tried_nodes, search.own_nodes, search.own_gap, search.fewest_units = 1, 3, own_gap, 4
        search.prepare(np.full(len(problem.free), 0.5))
        search.one_by_one = hasattr(search, "root")
        search._in_parallel(search._search, Deadline())
        assert search.open_bound() == np.inf
        found |= {search.reduced.removed(np.flatnonzero(mask)) for mask in search.masks()}
    assert all(problem.allows(removed) for removed in found)
    return sorted(problem.energy.energies(sorted(found)))[:states]


def drawn(seed: int) -> Problem | None:
    """A random problem, every third with kinds that must alternate in what stays; None where there is none."""
    problem = random_problem(seed)
    if problem is None or seed % 3:
        return problem
    kinds = np.random.default_rng(seed).integers(0, 2, len(problem.energy)).tolist()
    try:
        return replace(problem, pattern=pattern_of_kinds(kinds, (0, 1)))
    except InputError:
        return None


def is_right(seed: int) -> bool | None:
    """Whether both ways give the enumerated energies; None where the seed gives none or it has no states."""
    problem = drawn(seed)
    if problem is None:
        return None
    states = STATES[seed // 10 % len(STATES)]
    expected = [state.energy for state in Exhaustive().solve(problem, states)]
    if not expected:
        return None
    scale = float(np.abs(problem.energy.J).sum() + np.abs(problem.energy.h).sum())
    if seed // 40 % 2:
        found = lowest_one_by_one(problem, states, expected[-1], OWN_GAPS[seed // 80 % len(OWN_GAPS)])
    else:
        spectrum = BranchAndBound(restarts=1 + seed % 3, threads=1).solve(problem, states)
        found = [state.energy for state in spectrum] if spectrum.certified else []
    return len(found) == len(expected) and bool(np.allclose(found, expected, rtol=0, atol=1e-12 * scale))


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    started, wrong, compared, seed = time.perf_counter(), [], 0, arguments.start
    while compared < arguments.problems:
        right = is_right(seed)
        compared += right is not None
        if right is False:
            wrong.append(seed)
        seed += 1
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"compared": compared, "last seed": seed - 1, "wrong": wrong, "seconds": seconds}))


if __name__ == "__main__":
    main()
