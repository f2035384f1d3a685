"""Energies of gradients, and their lowest states: as proposals, and at the budgets around the one asked for."""

from __future__ import annotations

import warnings

from excise.choosing.proposal import Proposal
from excise.ising.energies import ENERGIES, Energy
from excise.ising.gradients import Gradients
from excise.ising.problem import Problem
from excise.ising.solvers import solve_all
from excise.ising.spectrum import Spectrum


def block_energies(gradients: Gradients) -> dict[str, Energy]:
    """Every energy that follows from gradients, over blocks; a warning they share is given once."""
    columns = gradients.blocks()
    # Energies share their gradients, so too few samples would be said once for each of them.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        energies = {name: build(columns) for name, build in ENERGIES.items()}
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(message, stacklevel=2)
    return energies


def lowest_states(name: str, spectrum: Spectrum, count: int, min_distance: int) -> list[Proposal]:
    """The lowest states of a spectrum at that distance from one another, as proposals of `name:k`."""
    apart = spectrum.select(count, min_distance=min_distance)
    return [Proposal(f"{name}:{spectrum.states.index(state)}", state.removed) for state in apart]


def around(problem: Problem, *, states: int, solver: str, seed: int, time_limit: float) -> dict[int, Spectrum]:
    """The lowest states at every budget up to twice a problem's, but for its own.

    Args:
        problem: with a budget M; empty for one whose units must keep a pattern, which leaves few budgets open.
        states: how many of the lowest, at each.
        solver: as for `excise.ising.solvers.solve_all`.
        seed: of the random parts.
        time_limit: seconds for all of them together.

    """
    if problem.budget is None or problem.pattern is not None:
        return {}
    most = min(2 * problem.budget, len(problem.free) + len(problem.forced), len(problem.energy) - 1)
    budgets = [m for m in range(max(1, len(problem.forced)), most + 1) if m != problem.budget]
    if not budgets:
        return {}
    return solve_all(problem, budgets, states=states, solver=solver, seed=seed, time_limit=time_limit)
