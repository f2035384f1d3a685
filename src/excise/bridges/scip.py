"""SCIP, through PySCIPOpt, on the linearised problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.bridges.extras import require
from excise.bridges.linearised import Answer, Linearised, lowest_by_exclusion
from excise.problem import Problem
from excise.spectrum import Spectrum


@dataclass(frozen=True)
class Scip:
    """The K lowest states by K solves, each excluding the states before; proved within SCIP's tolerances."""

    name: str = "scip"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states.

        Raises:
            MissingExtraError: pyscipopt is not installed.

        """
        scip = require("pyscipopt", "scip")
        return lowest_by_exclusion(
            problem,
            states,
            lambda program: _ScipModel(scip, program, seed),
            solver=self.name,
            seed=seed,
            time_limit=time_limit,
        )


class _ScipModel:
    def __init__(self, scip: Any, program: Linearised, seed: int) -> None:
        self.quicksum = scip.quicksum
        self.model = scip.Model()
        self.model.hideOutput()
        self.model.setParam("randomization/randomseedshift", seed % 2**31)
        self.model.setParam("limits/gap", 0.0)
        kinds = ["B"] * program.n + ["C"] * (len(program.cost) - program.n)
        z = [self.model.addVar(vtype=kind, lb=0, ub=1, obj=c) for kind, c in zip(kinds, program.cost, strict=True)]
        self.x = z[: program.n]
        for row in range(program.A.shape[0]):
            places = slice(program.A.indptr[row], program.A.indptr[row + 1])
            terms = zip(program.A.indices[places], program.A.data[places], strict=True)
            self._add(scip.quicksum(float(v) * z[k] for k, v in terms), program.lower[row], program.upper[row])

    def solve(self, seconds: float) -> Answer:
        self.model.setParam("limits/time", min(seconds, 1e20))
        self.model.optimize()
        status = self.model.getStatus()
        x = None
        if self.model.getNSols():
            best = self.model.getBestSol()
            x = np.array([self.model.getSolVal(best, v) > 0.5 for v in self.x], dtype=np.int8)
        bound, nodes = self.model.getDualbound(), int(self.model.getNNodes())
        return Answer(x, status in ("optimal", "infeasible"), bound, nodes)

    def exclude(self, row: NDArray[np.float64], bound: float) -> None:
        self.model.freeTransform()
        self._add(self.quicksum(float(a) * v for a, v in zip(row, self.x, strict=True)), -np.inf, bound)

    def _add(self, expression: Any, low: float, high: float) -> None:
        if low == high:
            self.model.addCons(expression == float(low))
        elif np.isfinite(low):
            self.model.addCons(expression >= float(low))
        else:
            self.model.addCons(expression <= float(high))
