"""Gurobi's solution pool as a solver. The licence that comes with gurobipy allows models of up to 2,000 variables."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import InputError
from excise.ising.bridges.extras import require
from excise.ising.bridges.proof import with_pool_bound
from excise.ising.bridges.refused import require_no_pattern
from excise.ising.problem import Problem
from excise.ising.solvers.base import make_spectrum
from excise.ising.spectrum import Spectrum


@dataclass(frozen=True)
class Gurobi:
    """The K lowest states by PoolSearchMode 2, the mode that searches them systematically.

    Certified only where the pool's own bound (PoolObjBound, below which no state is missing) reaches the last state
    kept; Gurobi may stop slightly before, and the spectrum then says how many of its states are proved. Every proof
    holds within Gurobi's floating-point tolerances.

    Args:
        threads: 0 for Gurobi's choice.

    """

    threads: int = 0
    name: str = "gurobi"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states.

        Raises:
            MissingExtraError: gurobipy is not installed.
            InputError: Gurobi refuses, most likely for want of a licence.

        """
        gurobi = require("gurobipy", "gurobi")
        try:
            return self._search(gurobi, problem, states, seed, time_limit)
        except gurobi.GurobiError as error:
            raise InputError(f"Gurobi refused ({error}); a licence of your own may be needed, see gurobi.com") from None

    def _search(self, gurobi: Any, problem: Problem, states: int, seed: int, time_limit: float | None) -> Spectrum:
        started = time.perf_counter()
        with gurobi.Env(params={"OutputFlag": 0}) as environment, gurobi.Model(env=environment) as model:
            scale = _build(model, gurobi, problem)
            model.Params.PoolSearchMode = 2
            model.Params.PoolSolutions = states
            # Linearised products can make the search of the pool far longer.
            model.Params.PreQLinearize = 0
            # The default of 1e-4 would call optimal what is not.
            model.Params.MIPGap = model.Params.MIPGapAbs = 0
            model.Params.Threads = self.threads
            # Gurobi takes no larger seed.
            model.Params.Seed = seed % 2_000_000_000
            if time_limit is not None:
                model.Params.TimeLimit = time_limit
            model.optimize()
            finished = model.Status == gurobi.GRB.OPTIMAL
            found = _pool(model, problem)
            spectrum = make_spectrum(
                problem,
                [removed for removed in found if problem.allows(removed)],
                states,
                solver=self.name,
                seconds=time.perf_counter() - started,
                evaluated=int(model.NodeCount),
                seed=seed,
                notes=() if finished else ("stopped before the pool was finished",),
            )
            exhausted = finished and len(found) < states
            return with_pool_bound(spectrum, model.PoolObjBound / scale, model.ObjBound / scale, exhausted, states)


def _build(model: Any, gurobi: Any, problem: Problem) -> float:
    """Build the model, the energy multiplied by the returned scale so that absolute tolerances are harmless."""
    require_no_pattern(problem)
    h, J = problem.energy.h, problem.energy.J
    n = len(h)
    scale = 1000.0 / (max(np.abs(h).max(), np.abs(J).max()) or 1.0)
    lowest, highest = np.zeros(n), np.ones(n)
    lowest[list(problem.forced)] = 1
    highest[list(problem.protected)] = 0
    x = model.addMVar(n, lb=lowest, ub=highest, vtype=gurobi.GRB.BINARY)
    model.setObjective(x @ (scale * J) @ x + (scale * h) @ x)
    if problem.budget is None:
        model.addConstr(x.sum() >= 1)
    else:
        model.addConstr(x.sum() == problem.budget)
    for constraint in problem.constraints:
        weights = np.array(constraint.weights)
        size = np.abs(weights).max() or 1.0
        model.addConstr((weights / size) @ x >= (constraint.at_least - constraint.slack) / size)
    return scale


def _pool(model: Any, problem: Problem) -> list[tuple[int, ...]]:
    found = []
    variables = model.getVars()
    for k in range(model.SolCount):
        model.Params.SolutionNumber = k
        values: NDArray[np.float64] = np.array(model.getAttr("PoolNX", variables))
        found.append(tuple(np.flatnonzero(values > 0.5).tolist()))
    return found
