"""Who proposes what: energies and their lowest states, the refinement, rival criteria and chance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from excise.artefacts import read_json, write_json
from excise.choosing.criteria import CRITERIA, RANDOM
from excise.choosing.refine import Refined, no_energy, plan, refine
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.energies import ENERGIES, Energy
from excise.ising.gradients import Gradients
from excise.ising.problem import Problem
from excise.ising.solvers import solve
from excise.ising.spectrum import Spectrum
from excise.measuring.objectives import Objective
from excise.models.removable import block_problem
from excise.models.stack import Stack
from excise.progress import Progress

Removal = tuple[int, ...]
Proposal = tuple[str, Removal]


def block_energies(gradients: Gradients) -> dict[str, Energy]:
    """Every energy that follows from gradients, over blocks; a warning they share is given once."""
    columns = gradients.blocks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        energies = {name: build(columns) for name, build in ENERGIES.items()}
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(message, stacklevel=2)
    return energies


def lowest_states(name: str, spectrum: Spectrum, count: int, min_distance: int) -> list[Proposal]:
    """The lowest states of a spectrum at that distance from one another, named `name:k`."""
    apart = spectrum.select(count, min_distance=min_distance)
    return [(f"{name}:{spectrum.states.index(state)}", state.removed) for state in apart]


@dataclass(frozen=True)
class Proposer:
    """All who propose removals of one budget, on the same calibration samples; what they say is kept in `work`.

    Args:
        stack: the model.
        calibration: samples to choose by.
        budget: number M of blocks to remove.
        protected: blocks that stay.
        forced: blocks that go; they count towards the budget.
        seed: of everything random.
        work: folder that makes all of it resumable.
        progress: shows progress.

    """

    stack: Stack
    calibration: Samples
    budget: int
    protected: tuple[int, ...]
    forced: tuple[int, ...]
    seed: int
    work: Path
    progress: Progress

    def spectra(self, energies: Mapping[str, Energy], **options: Any) -> dict[str, Spectrum]:
        """The spectrum of each energy; options as for `excise.ising.solvers.solve`."""
        problems = {n: self._problem(energy) for n, energy in energies.items()}
        return {name: solve(problem, seed=self.seed, **options) for name, problem in problems.items()}

    def _problem(self, energy: Energy) -> Problem:
        return block_problem(self.stack, energy, self.budget, self.protected, self.forced)

    def refined(self, objective: Objective, tokens: float) -> Refined:
        """What refinement finds by an objective for about so many forward tokens."""
        units = len(self._problem(no_energy(len(self.stack.blocks))).free)
        with self.progress("refine", plan(units, self.budget, tokens).measurements(units)) as advance:
            return refine(
                self.stack,
                objective,
                self.budget,
                tokens=tokens,
                protected=self.protected,
                forced=self.forced,
                seed=self.seed,
                work=self.work / "refine",
                advance=advance,
            )

    def rivals(self, names: Sequence[str], random_states: int) -> list[Proposal]:
        """What each criterion removes, and as many random removals."""
        chosen = [(name, self._criterion(name, self.seed)) for name in names]
        drawn = range(self.seed, self.seed + random_states)
        return chosen + [(f"{RANDOM}:{seed}", self._criterion(RANDOM, seed)) for seed in drawn]

    def _criterion(self, name: str, seed: int) -> Removal:
        """A criterion's choice; forced blocks go first, the criterion fills the budget."""
        fixed = {"protected": list(self.protected), "forced": list(self.forced)}
        key = {"samples": self.calibration.hash, "budget": self.budget, "seed": seed, **fixed}
        path = self.work / f"selection-{name}-{seed}.json"
        if path.exists() and (kept := read_json(path))["key"] == key:
            return tuple(kept["removed"])
        rest = self.budget - len(self.forced)
        if rest == 0:
            return self.forced
        passes = {"block-influence-iterative": rest, "block-influence": 1, "norm-ratio": 1, RANDOM: 0}.get(name)
        with self.progress(name, None if passes is None else passes * self.calibration.tokens) as advance:
            selection = CRITERIA[name](
                self.stack,
                self.calibration,
                rest,
                protected=(*self.protected, *self.forced),
                seed=seed,
                work=self.work / name,
                advance=advance,
            )
        if selection.merge:
            raise InputError(f"{name} merges blocks where a run drops them; leave it out of the rivals")
        removed = tuple(sorted((*selection.removed, *self.forced)))
        write_json(path, {"key": key, "removed": removed, "selection": asdict(selection)})
        return removed
