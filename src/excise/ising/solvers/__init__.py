"""Solvers by name, and `solve`, the one entry to all of them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from dataclasses import replace

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers.base import Solver
from excise.ising.spectrum import Spectrum

# Named, not imported: importing numba takes most of a second, and the bridges need packages of their own.
SOLVERS = {
    "branch-and-bound": "excise.ising.solvers.branch_and_bound:BranchAndBound",
    "exhaustive": "excise.ising.solvers.exhaustive:Exhaustive",
    "tabu": "excise.ising.solvers.tabu:Tabu",
    "annealing": "excise.ising.solvers.annealing:Annealing",
    "gurobi": "excise.ising.bridges.gurobi:Gurobi",
    "scip": "excise.ising.bridges.scip:Scip",
    "highs": "excise.ising.bridges.highs:Highs",
    "dimod-sa": "excise.ising.bridges.dimod:simulated_annealing",
    "dimod-tabu": "excise.ising.bridges.dimod:tabu",
    "dimod-descent": "excise.ising.bridges.dimod:steepest_descent",
}

AUTO_EXHAUSTIVE_STATES = 10**6
MOST_STATES = 1_000_000

__all__ = ["SOLVERS", "Problem", "Solver", "Spectrum", "chosen", "make_solver", "solve", "solve_all", "warm_up"]


def make_solver(name: str) -> Solver:
    """A solver by its name in SOLVERS, with default hyper-parameters.

    Raises:
        InputError: an unknown name.

    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver {name!r}; choose one of auto, {', '.join(SOLVERS)}")
    module, attribute = SOLVERS[name].split(":")
    return getattr(importlib.import_module(module), attribute)()


def chosen(problem: Problem, name: str) -> Solver:
    """The solver of that name; of "auto", enumeration where there are few states, else branch-and-bound.

    Raises:
        InputError: an unknown name.

    """
    few = problem.number_of_states() <= AUTO_EXHAUSTIVE_STATES
    return make_solver(name if name != "auto" else "exhaustive" if few else "branch-and-bound")


def solve(
    problem: Problem,
    *,
    states: int = 20,
    solver: str | Solver = "auto",
    seed: int = 0,
    time_limit: float | None = None,
    min_distance: int = 1,
) -> Spectrum:
    """Find the lowest states of a problem.

    Args:
        problem: What to solve.
        states: How many of the lowest states, K.
        solver: A name from SOLVERS, a solver of your own, or "auto" (enumeration when tiny, else branch-and-bound).
        seed: Seed of the random parts.
        time_limit: Seconds after which the best known is returned; None for no limit.
        min_distance: Smallest Hamming distance between returned states. States are taken greedily from the spectrum in
            order of energy, which is grown until enough are found or it is exhausted.

    Raises:
        InputError: an unknown solver or a number out of range.

    >>> import numpy as np
    >>> from excise.ising.energies import Energy
    >>> solve(Problem(Energy(None, np.diag([3.0, 1.0, 2.0])), budget=2), states=2)[0]
    State(removed=(1, 2), energy=3.0)

    """
    _check(states, min_distance, time_limit)
    taken = chosen(problem, solver) if isinstance(solver, str) else solver
    if min_distance == 1:
        return taken.solve(problem, states, seed=seed, time_limit=time_limit)
    return _solve_apart(problem, states, taken, seed, time_limit, min_distance)


def solve_all(
    problem: Problem,
    budgets: Iterable[int],
    *,
    states: int = 20,
    solver: str | Solver = "auto",
    seed: int = 0,
    time_limit: float | None = None,
    min_distance: int = 1,
) -> dict[int, Spectrum]:
    """Solve a problem for several budgets; branch-and-bound shares work between them and uses all cores.

    Args:
        problem: What to solve; its own budget is ignored.
        budgets: Numbers of units to remove.
        states: How many of the lowest states for each.
        solver: As for `solve`.
        seed: Seed of the random parts.
        time_limit: Seconds for all budgets together.
        min_distance: As for `solve`.

    Raises:
        InputError: a budget is out of range, or as for `solve`.

    >>> import numpy as np
    >>> from excise.ising.energies import Energy
    >>> spectra = solve_all(Problem(Energy(None, np.diag([3.0, 1.0, 2.0])), budget=1), [1, 2], states=1)
    >>> [(budget, spectrum[0].energy) for budget, spectrum in spectra.items()]
    [(1, 1.0), (2, 3.0)]

    """
    _check(states, min_distance, time_limit)
    asked = sorted(set(budgets))
    problems = [replace(problem, budget=budget) for budget in asked]
    if solver == "auto":
        solver = make_solver("branch-and-bound")
    if isinstance(solver, str):
        solver = make_solver(solver)
    if solver.name == "branch-and-bound" and min_distance == 1:
        from excise.ising.solvers.branch_and_bound import BranchAndBound
        from excise.ising.solvers.budgets import prove_budgets

        assert isinstance(solver, BranchAndBound)
        return dict(zip(asked, prove_budgets(problems, solver, states, seed, time_limit), strict=True))
    started = time.perf_counter()
    spectra = {}
    for k, budget in enumerate(asked):
        left = None
        if time_limit is not None:
            left = max(0.01, time_limit - (time.perf_counter() - started)) / (len(asked) - k)
        spectra[budget] = solve(
            problems[k], states=states, solver=solver, seed=seed, time_limit=left, min_distance=min_distance
        )
    return spectra


def warm_up() -> float:
    """Compile the kernels of enumeration and branch-and-bound, or load them from the cache; return the seconds taken.

    The first solve on a machine takes some forty seconds longer than later ones for this; call it where nobody waits.
    """
    started = time.perf_counter()
    problem = Problem(Energy(None, [[float(i == j) + 0.1 for i in range(8)] for j in range(8)]), budget=4)
    for name in ("exhaustive", "branch-and-bound"):
        make_solver(name).solve(problem, 2)
    # Small problems never come to a bound of one node by itself.
    importlib.import_module("excise.ising.solvers.nodes").compile_kernels()
    return time.perf_counter() - started


def _check(states: int, min_distance: int, time_limit: float | None) -> None:
    if states < 1:
        raise InputError(f"states must be 1 or more, got {states}")
    if min_distance < 1:
        raise InputError(f"min_distance must be 1 or more (1 asks only that states differ), got {min_distance}")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"time limit must be above 0 seconds, got {time_limit}")


def _solve_apart(
    problem: Problem, states: int, solver: Solver, seed: int, time_limit: float | None, min_distance: int
) -> Spectrum:
    started = time.perf_counter()
    asked = 4 * states
    while True:
        left = None if time_limit is None else max(0.01, time_limit - (time.perf_counter() - started))
        spectrum = solver.solve(problem, asked, seed=seed, time_limit=left)
        kept = spectrum.select(states, min_distance=min_distance)
        exhausted = spectrum.complete or len(spectrum) < asked
        out_of_time = time_limit is not None and time.perf_counter() - started > time_limit
        if len(kept) == states or exhausted or out_of_time or asked >= MOST_STATES:
            break
        asked = min(4 * asked, MOST_STATES)
    notes = list(spectrum.notes)
    if len(kept) < states:
        why = "no others exist" if spectrum.complete else f"among the {len(spectrum)} lowest"
        notes.append(f"{len(kept)} of {states} states at distance {min_distance} or more ({why})")
    proved = set(spectrum.states[: spectrum.proved])
    whole = len(kept) == states or spectrum.complete
    return replace(
        spectrum,
        states=kept,
        certified=spectrum.certified and whole,
        seconds=time.perf_counter() - started,
        proved=sum(state in proved for state in kept),
        complete=False,
        notes=tuple(notes),
    )
