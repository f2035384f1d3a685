"""SCIP, through PySCIPOpt: the energy is one quadratic constraint, which SCIP handles faster here than products."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.ising.bridges.exclusion import LARGEST, Answer, exclusion, free_part, lowest_by_exclusion
from excise.ising.bridges.extras import require
from excise.ising.problem import Problem
from excise.ising.spectrum import Spectrum


@dataclass(frozen=True)
class Scip:
    """The K lowest states by K solves, each excluding the states before; proved within SCIP's tolerances."""

    name: str = "scip"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states.

        Raises:
            MissingExtraError: pyscipopt is not installed.

        """
        started = time.perf_counter()
        model = _ScipModel(require("pyscipopt", "scip"), problem, seed)
        return lowest_by_exclusion(
            problem, states, model, solver=self.name, seed=seed, started=started, time_limit=time_limit
        )


class _ScipModel:
    def __init__(self, scip: Any, problem: Problem, seed: int) -> None:
        self.problem, self.sum = problem, scip.quicksum
        self.model = scip.Model()
        self.model.hideOutput()
        self.model.setParam("randomization/randomseedshift", seed % 2**31)
        self.model.setParam("limits/gap", 0.0)
        reduced = free_part(problem)
        n = len(reduced.h)
        self.constant = reduced.constant
        self.scale = LARGEST / (max(np.abs(reduced.h).max(initial=0.0), np.abs(reduced.J).max(initial=0.0)) or 1.0)
        self.x = [self.model.addVar(vtype="B") for _ in range(n)]
        energy = self.model.addVar(lb=None, obj=1.0)
        terms = [float(self.scale * reduced.h[i]) * self.x[i] for i in range(n)]
        terms += [float(self.scale * reduced.J[i, i]) * self.x[i] * self.x[i] for i in range(n)]
        terms += [
            float(2 * self.scale * reduced.J[i, j]) * self.x[i] * self.x[j] for i in range(n) for j in range(i + 1, n)
        ]
        self.model.addCons(scip.quicksum(terms) <= energy)
        if problem.budget is None:
            self.model.addCons(scip.quicksum(self.x) >= (0 if reduced.forced else 1))
        else:
            self.model.addCons(scip.quicksum(self.x) == reduced.count)
        for weights, bound in zip(reduced.C, reduced.bounds, strict=True):
            size = np.abs(weights).max(initial=0.0) or 1.0
            self.model.addCons(self._weighed(weights / size) >= float(bound / size))

    def solve(self, seconds: float) -> Answer:
        # 1e20 is SCIP's infinity; a larger number is refused.
        self.model.setParam("limits/time", min(seconds, 1e20))
        self.model.optimize()
        x = None
        if self.model.getNSols():
            best = self.model.getBestSol()
            x = np.array([self.model.getSolVal(best, v) > 0.5 for v in self.x], dtype=np.int8)
        bound = self.model.getDualbound() / self.scale + self.constant
        return Answer(x, self.model.getStatus() in ("optimal", "infeasible"), bound, int(self.model.getNNodes()))

    def exclude(self, x: NDArray[np.int8]) -> None:
        row, bound = exclusion(self.problem, x)
        # SCIP takes constraints before it has transformed a problem, and not after.
        self.model.freeTransform()
        self.model.addCons(self._weighed(row) <= bound)

    def _weighed(self, weights: NDArray[np.float64]) -> Any:
        return self.sum(float(w) * v for w, v in zip(weights, self.x, strict=True))
