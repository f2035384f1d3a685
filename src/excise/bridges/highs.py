"""HiGHS, the copy that SciPy carries, on the linearised problem: needs no extra."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.bridges.linearised import Answer, Linearised, lowest_by_exclusion
from excise.problem import Problem
from excise.spectrum import Spectrum


@dataclass(frozen=True)
class Highs:
    """The K lowest states by K solves, each excluding the states before; proved within HiGHS's tolerances.

    Deterministic: the seed is only recorded.
    """

    name: str = "highs"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states."""
        return lowest_by_exclusion(problem, states, _HighsModel, solver=self.name, seed=seed, time_limit=time_limit)


class _HighsModel:
    def __init__(self, program: Linearised) -> None:
        self.program = program
        self.rows: list[NDArray[np.float64]] = []
        self.bounds: list[float] = []

    def solve(self, seconds: float) -> Answer:
        from scipy.optimize import Bounds, LinearConstraint, milp

        program, width = self.program, len(self.program.cost)
        if width == 0:
            return Answer(None if self.rows else np.zeros(0, dtype=np.int8), True, 0.0, 0)
        constraints = [LinearConstraint(program.A, program.lower, program.upper)]
        if self.rows:
            constraints.append(LinearConstraint(np.array(self.rows), -np.inf, np.array(self.bounds)))
        result = milp(
            program.cost,
            constraints=constraints,
            bounds=Bounds(np.zeros(width), np.ones(width)),
            integrality=np.arange(width) < program.n,
            options={"mip_rel_gap": 0.0, **({"time_limit": seconds} if math.isfinite(seconds) else {})},
        )
        x = None if result.x is None else (result.x[: program.n] > 0.5).astype(np.int8)
        bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        return Answer(x, result.status in (0, 2), bound, int(result.mip_node_count or 0))

    def exclude(self, row: NDArray[np.float64], bound: float) -> None:
        self.rows.append(np.concatenate([row, np.zeros(len(self.program.cost) - len(row))]))
        self.bounds.append(bound)
