"""What every solver shares: the interface, and turning raw states into a Spectrum with recomputed energies."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from excise.ising.problem import Problem
from excise.ising.spectrum import Spectrum, State


class Solver(Protocol):
    """A solver: a frozen dataclass of hyper-parameters, with a name and this method."""

    @property
    def name(self) -> str:
        """The solver's key in SOLVERS."""
        ...

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return up to `states` of the lowest states, within about `time_limit` seconds."""
        ...


@dataclass
class Deadline:
    """A moment on the monotonic clock, infinitely far when there is no limit; `cancel` moves it to the past."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """The moment `seconds` from now."""
        return cls() if seconds is None else cls(time.perf_counter() + seconds)

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return math.isfinite(self.at)

    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.at - time.perf_counter())

    def passed(self) -> bool:
        """Whether the moment has come."""
        return time.perf_counter() >= self.at

    def cancel(self) -> None:
        """Let it have passed."""
        self.at = -math.inf


def make_spectrum(problem: Problem, found: Iterable[Iterable[int]], states: int, **fields: Any) -> Spectrum:
    """A Spectrum of the `states` lowest of the configurations `found`.

    Energies are recomputed with `Energy.energy`, whatever the solver believed; the order is by energy, then `removed`.

    Args:
        problem: The problem solved.
        found: Configurations as original indices of all removed units.
        states: Number of states to keep.
        **fields: Remaining fields of Spectrum: solver, seconds, certified, …

    """
    removed = sorted({tuple(sorted(units)) for units in found})
    energies = problem.energy.energies(removed)
    lowest = sorted(zip(energies, removed, strict=True))[:states]
    return Spectrum(
        tuple(State(units, energy) for energy, units in lowest),
        units=len(problem.energy),
        budget=problem.budget,
        **fields,
    )


def removed_sets(problem: Problem, masks: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """Original indices removed, for masks over the free units of a problem, [states, n]."""
    free = np.array(problem.free, dtype=np.int64)
    return [tuple(sorted((*problem.forced, *free[mask != 0].tolist()))) for mask in masks]
