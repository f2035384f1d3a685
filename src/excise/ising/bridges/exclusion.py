"""The K lowest states from a solver that finds one: exclude each state found and solve again."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from excise.ising.bridges.refused import require_no_pattern
from excise.ising.problem import Problem, Reduced
from excise.ising.solvers.base import make_spectrum, removed_sets
from excise.ising.spectrum import Spectrum

# Coefficient of the scaled objective, so that absolute tolerances are harmless.
LARGEST = 1000.0


@dataclass(frozen=True)
class Answer:
    """One solve.

    Args:
        x: The best state of the free units found, [n]; None where there is none.
        proved: Whether it is proved to be the lowest left, or that none is left.
        bound: No state left has a lower energy.
        nodes: Search nodes.

    """

    x: NDArray[np.int8] | None
    proved: bool
    bound: float
    nodes: int


class Backend(Protocol):
    """A solver that holds a model of a problem."""

    def solve(self, seconds: float) -> Answer:
        """Solve within a time limit."""
        ...

    def exclude(self, x: NDArray[np.int8]) -> None:
        """Allow every state but this one from now on."""
        ...


def free_part(problem: Problem) -> Reduced:
    """The problem without its fixed units; its count is that of the budget, 0 and to be ignored where there is none.

    Raises:
        InputError: the problem asks that what stays keeps a pattern.

    """
    require_no_pattern(problem)
    return problem.reduced(len(problem.forced) if problem.budget is None else None)


def exclusion(problem: Problem, x: NDArray[np.int8]) -> tuple[NDArray[np.float64], float]:
    """Row a and bound b of the constraint aᵀx ≤ b that excludes the state x of the free units and no other."""
    row = x.astype(np.float64)
    # With a fixed count no other state holds all of its units; without, its supersets must stay allowed.
    return (row if problem.budget is not None else 2 * row - 1), float(x.sum() - 1)


def lowest_by_exclusion(
    problem: Problem,
    states: int,
    backend: Backend,
    *,
    solver: str,
    seed: int,
    started: float,
    time_limit: float | None,
) -> Spectrum:
    """Return the K lowest states: solve, exclude the state found, solve again; each solve proves one more state.

    Args:
        problem: What to solve.
        states: Number of states K.
        backend: Holds the model.
        solver: Name for the spectrum.
        seed: For the spectrum; the backend has its own.
        started: `time.perf_counter()` before the model was built.
        time_limit: Seconds for all solves together.

    """
    deadline = math.inf if time_limit is None else started + time_limit
    found: list[tuple[int, ...]] = []
    proved, nodes, exhausted, bound, notes = 0, 0, False, -math.inf, ("proved within the solver's tolerances",)
    while proved < states and not exhausted:
        try:
            answer = backend.solve(max(0.01, deadline - time.perf_counter()))
        except KeyboardInterrupt:
            answer = Answer(None, False, -math.inf, 0)
        nodes += answer.nodes
        # Once the ground state is proved, solves bound what is left of the states, and no longer it.
        bound = max(bound, answer.bound) if not proved else bound
        removed = None if answer.x is None else removed_sets(problem, answer.x[None, :].astype(np.uint8))[0]
        # Solvers let constraints go by a tolerance.
        allowed = removed is not None and problem.allows(removed)
        found += [removed] if removed is not None and allowed else []
        if not answer.proved:
            notes = (f"stopped after {proved} of {states} states were proved",)
            break
        if answer.x is None:
            exhausted = True
        else:
            proved += int(allowed)
            backend.exclude(answer.x)
    spectrum = make_spectrum(
        problem,
        found,
        states,
        solver=solver,
        seconds=time.perf_counter() - started,
        evaluated=nodes,
        seed=seed,
        notes=notes,
    )
    if exhausted or proved == len(spectrum) == states:
        return replace(spectrum.with_proof(), complete=exhausted)
    if not len(spectrum):
        return replace(spectrum, lower_bound=bound if math.isfinite(bound) else None)
    lowest = spectrum[0].energy
    lower = lowest if proved else min(bound, lowest)
    if not math.isfinite(lower):
        return spectrum
    gap = (lowest - lower) / abs(lowest) if lowest else None
    return replace(spectrum, lower_bound=lower, gap=gap, proved=proved)
