"""The refinement loop: solve the energy, measure what it points at, fit the energy to all measurements, again.

Every round proposes removals not yet measured: a few where damage is lowest (the lowest states of the posterior mean,
far apart, and swap neighbours of the best removal so far, in the order of predicted damage), and for the rest those of
the lowest states whose measurement tells most about all of them (`excise.ising.energies.fitted.Fitted.most_telling`).
Otherwise all that is measured lies in a few valleys, and the fit is wrong about low states elsewhere. Every round may
be measured on other samples: what those have in common is part of the fit, and what they say of single removals is
averaged by it. The loop knows nothing of models: `measure` is any function from removals to damages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from excise.ising.energies import Energy
from excise.ising.energies.fitted import Fitted, Noise, fit, likeliest
from excise.ising.problem import Problem, Removal, weigh_at_least
from excise.ising.solvers import solve
from excise.ising.spectrum import Spectrum
from excise.team import team

# States of the last solve, and of those asked for around one removal.
LOWEST = 64
# States of the posterior mean that a fit is to be right about, and that a round chooses from; of 512 it learnt less.
AMONG = 2000
# Of a round, about so many go where damage is lowest; the others tell about the rest (log, 2026-11-30, what a round
# measures).
LOW_SHARE = 0.25
# Two swaps: states a single swap apart are what the neighbours try anyway.
APART = 4
# Of the excess damage: how far a quadratic energy is off. And of a measurement's standard error: what is left of it in
# differences from removals measured on the same samples; the rest they have in common. Grids, from which the marginal
# likelihood chooses after every round (log, 2026-11-29, noise of differences).
MISFITS = (0.15, 0.3, 0.5)
UNSHARED = (0.125, 0.25, 0.5, 1.0)
# Nats. A measurement that claims to be exact, as of the intact model, would leave the kernel matrix singular.
LEAST_NOISE = 1e-3
# Seconds for the last solve, whose states are listed with their proof.
TIME_LIMIT = 10.0
# A proposal gets measured, so it may do without a proof where that takes long.
MOST_PROVED = 64


class Measured(NamedTuple):
    """Damage of a removal.

    Attributes:
        damage: nats; infinite where the model overflowed.
        error: its standard error over samples, nats.
        slice: number of the samples it was measured on; damages on the same samples compare best.

    """

    damage: float
    error: float
    slice: int = 0


# Of removals, in a round of this number.
Measure = Callable[[Sequence[Removal], int], Mapping[Removal, Measured]]


@dataclass(frozen=True, eq=False)
class Round:
    """What one round did.

    Attributes:
        proposed: removals measured in it.
        best: lowest damage of the wanted size so far, nats.
        predicted: their damage as the last fit has it from all other measurements, nats.
        measured: as measured, nats, less what the samples of the round have in common, as that fit sees it.

    """

    proposed: tuple[Removal, ...]
    best: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


class Diary(Protocol):
    """Where a search writes what it proposes, and finds what it had proposed when it was interrupted."""

    @property
    def rounds(self) -> Sequence[Sequence[Removal]]:
        """Removals of each round so far."""

    def record(self, proposed: Sequence[Removal]) -> None:
        """Add a round."""


@dataclass(frozen=True, eq=False)
class Search:
    """Where the loop ended.

    Attributes:
        fitted: posterior after the last round.
        damages: of everything measured.
        rounds: in order.
        spectrum: lowest states of the last posterior mean.

    """

    fitted: Fitted
    damages: Mapping[Removal, Measured]
    rounds: tuple[Round, ...]
    spectrum: Spectrum

    def compared(self) -> dict[Removal, float]:
        """Damages as if all were measured on the same samples, nats: less what those of a slice have in common."""
        return _compared(self.fitted, self.damages)

    def left_out(self, removals: Sequence[Removal]) -> list[tuple[float, float]]:
        """(predicted from all other measurements, measured) of measured removals, nats, as of the same samples."""
        fitted, compared = self.fitted, self.compared()
        finite = [removed for removed, measured in self.damages.items() if math.isfinite(measured.damage)]
        predicted: dict[Removal, float] = {}
        if finite:
            left = fitted.leave_one_out()[0] - fitted.damages + fitted.corrected()
            predicted = dict(zip(finite, left.tolist(), strict=True))
        # What overflowed is in no fit.
        energy = fitted.energy()
        return [(predicted[r] if r in predicted else energy.energy(r), compared[r]) for r in removals]

    def best(self, problem: Problem, count: int = 1) -> list[Removal]:
        """The `count` removals that a problem allows with the lowest damage measured, lowest first.

        Damages measured on different samples are compared less what those have in common.
        """
        return _ranked(self.fitted, self.damages, problem)[:count]


def search(
    measure: Measure,
    prior: Energy,
    problem: Problem,
    *,
    rounds: int,
    batch: int = 8,
    known: Mapping[Removal, Measured] | None = None,
    diary: Diary | None = None,
) -> Search:
    """Look for the removal of least measured damage.

    Args:
        measure: removals and the number of the round → the damage of each.
        prior: what is believed before anything is measured, nats.
        problem: budget, protected and forced units, constraints; its energy is not used.
        rounds: rounds of proposals.
        batch: removals measured per round.
        known: what was measured already, of any size (singles, pairs, other budgets).
        diary: what the first rounds of an interrupted search proposed, which are not proposed anew; every new round is
            recorded in it before it is measured.

    """
    damages = dict(known or {})
    history: list[Round] = []
    fitted = _fitted(prior, damages, problem)
    for number in range(rounds):
        # Proposed by one process and told to the others: solves have time limits, so two could propose differently.
        proposed = team().once(partial(_next, number, diary, fitted, problem, damages, batch))
        if not proposed:
            break
        # Kept even where infinite: `_propose` must not ask for them again.
        damages |= measure(proposed, number)
        fitted = _fitted(prior, damages, problem)
        compared = _compared(fitted, damages)
        best = min((d for r, d in compared.items() if problem.allows(r) and math.isfinite(d)), default=math.nan)
        history.append(Round(tuple(proposed), best, (), ()))
    found = Search(fitted, damages, tuple(history), team().once(lambda: _listed(fitted.energy(), problem)))
    proposed = [removed for each in history for removed in each.proposed]
    pairs = dict(zip(proposed, found.left_out(proposed), strict=True))
    told = [
        replace(
            each,
            predicted=tuple(pairs[r][0] for r in each.proposed),
            measured=tuple(pairs[r][1] for r in each.proposed),
        )
        for each in history
    ]
    return replace(found, rounds=tuple(told))


def _compared(fitted: Fitted, damages: Mapping[Removal, Measured]) -> dict[Removal, float]:
    """Each removal's damage less what those measured on the same samples have in common; infinite ones as they are."""
    finite = [removed for removed, measured in damages.items() if math.isfinite(measured.damage)]
    corrected = dict(zip(finite, fitted.corrected().tolist(), strict=True)) if finite else {}
    return {removed: corrected.get(removed, measured.damage) for removed, measured in damages.items()}


def _ranked(fitted: Fitted, damages: Mapping[Removal, Measured], problem: Problem) -> list[Removal]:
    """Removals that a problem allows and that were measured, the lowest first, without those that overflowed."""
    allowed = [(d, r) for r, d in _compared(fitted, damages).items() if problem.allows(r) and math.isfinite(d)]
    return [removed for _, removed in sorted(allowed)]


def _next(
    number: int,
    diary: Diary | None,
    fitted: Fitted,
    problem: Problem,
    damages: Mapping[Removal, Measured],
    batch: int,
) -> list[Removal]:
    """Removals of a round, as the diary has them or new ones."""
    if diary is not None and number < len(diary.rounds):
        return [tuple(removed) for removed in diary.rounds[number]]
    proposed = _propose(fitted, problem, damages, batch)
    if diary is not None:
        # Before they are measured: an interrupted round could not be proposed again alike.
        diary.record(proposed)
    return proposed


def _fitted(prior: Energy, damages: Mapping[Removal, Measured], problem: Problem) -> Fitted:
    """The fit to what is finite; to nothing, while all that was measured overflowed."""
    if any(math.isfinite(measured.damage) for measured in damages.values()):
        return fit_around_the_best(prior, damages, problem)
    return fit(prior, {(): 0.0}, LEAST_NOISE)


def fit_around_the_best(prior: Energy, damages: Mapping[Removal, Measured], problem: Problem) -> Fitted:
    """Fit an energy that is meant to be right near the best removal.

    No quadratic energy fits damages from 0.5 to 15 nats, and the large ones do not matter: what exceeds the lowest
    damage of the wanted size is taken as noisier in proportion. Standard errors are of damages by themselves: most of
    that is common to all removals on the same samples, whose texts suffer more or less, all in the same proportion.
    """
    finite = [measured for measured in damages.values() if math.isfinite(measured.damage)]
    sized = [m for removed, m in damages.items() if problem.allows(removed) and math.isfinite(m.damage)]
    # Damage itself, not its log or root: singles do not add up on those scales, and ρ fell below 0 (log, 2026-11-24,
    # what counts in a chat).
    values = {removed: measured.damage for removed, measured in damages.items()}
    groups = {removed: measured.slice for removed, measured in damages.items()}
    # One ratio for all: that of a single removal is of few samples, and its luck would go into its damage.
    ratio = float(np.median([m.error / m.damage for m in sized or finite if m.damage > 0] or [0.0]))

    def fitted(compared: Mapping[Removal, float]) -> Fitted:
        known = [d for d in compared.values() if math.isfinite(d)]
        allowed = [d for removed, d in compared.items() if problem.allows(removed) and math.isfinite(d)]
        lowest = min(allowed, default=max(known, default=0.0))
        noises = [
            Noise(
                {r: _own(compared[r] - lowest, m.error, misfit, unshared) for r, m in damages.items()},
                {r: math.sqrt(1 - unshared**2) * ratio * m.damage for r, m in damages.items()},
                groups,
            )
            for misfit, unshared in itertools.product(MISFITS, UNSHARED)
        ]
        return likeliest(prior, values, noises)

    first = fitted(values)
    # What exceeds the lowest is told only once slices are: on one that suffers little, nothing would seem to.
    return fitted(_compared(first, damages)) if len(set(groups.values())) > 1 else first


def _own(excess: float, error: float, misfit: float, unshared: float) -> float:
    return math.hypot(max(unshared * error, LEAST_NOISE), misfit * max(0.0, excess))


def _propose(fitted: Fitted, problem: Problem, damages: Mapping[Removal, Measured], batch: int) -> list[Removal]:
    """Up to `batch` removals not yet measured."""
    # A tiny space can be measured whole; without this the loop would look for what does not exist.
    if sum(problem.allows(removed) for removed in damages) >= problem.number_of_states():
        return []
    energy = fitted.energy()
    lowest = _lowest(energy, problem, AMONG)
    centres = _ranked(fitted, damages, problem)
    low = _in_turn([_apart(lowest), _neighbours(energy, problem, centres)], damages)
    chosen = list(itertools.islice(low, max(1, round(LOW_SHARE * batch))))
    fresh = [state.removed for state in lowest if state.removed not in damages and state.removed not in chosen]
    chosen += fitted.most_telling(fresh, batch - len(chosen))
    # Where hardly any state is left to tell about, as in small spaces.
    return list(itertools.islice(dict.fromkeys(itertools.chain(chosen, low)), batch))


def _in_turn(sources: list[Iterator[Removal]], damages: Mapping[Removal, Measured]) -> Iterator[Removal]:
    """Removals not yet measured, one of each source in turn, none twice."""
    told: set[Removal] = set()
    while sources:
        for source in list(sources):
            fresh = next((r for r in source if r not in damages and r not in told), None)
            if fresh is None:
                sources.remove(source)
            else:
                told.add(fresh)
                yield fresh


def _listed(energy: Energy, problem: Problem) -> Spectrum:
    return solve(replace(problem, energy=energy), states=LOWEST, time_limit=TIME_LIMIT)


def _lowest(energy: Energy, problem: Problem, states: int) -> Spectrum:
    """Low states to propose, by far most often the lowest."""
    solver = "auto" if len(problem.free) <= MOST_PROVED else "tabu"
    return solve(replace(problem, energy=energy), states=states, solver=solver, time_limit=TIME_LIMIT)


def _apart(spectrum: Spectrum) -> Iterator[Removal]:
    """States at distance `APART` or more from one another first, then the others, each in the order of energy."""
    # Far apart first, or a whole round would go to one valley and its neighbours.
    yield from (state.removed for state in spectrum.select(len(spectrum), min_distance=APART))
    yield from (state.removed for state in spectrum)


def _neighbours(energy: Energy, problem: Problem, centres: Sequence[Removal]) -> Iterator[Removal]:
    """Neighbours at one swap of the best removals measured, best first, each in the order of predicted damage."""
    # The runner-up's neighbours follow only where all of the best's are measured.
    for centre in centres:
        if problem.pattern is not None:
            # One swap reaches little that keeps a pattern: everything within two swaps, as the solver orders it.
            near = weigh_at_least([float(i in centre) for i in range(len(energy))], len(centre) - 2)
            nearby = replace(problem, constraints=(*problem.constraints, near))
            yield from (state.removed for state in _lowest(energy, nearby, LOWEST))
            continue
        feasible = [removed for removed in _one_step_from(centre, problem) if problem.allows(removed)]
        yield from (r for _, r in sorted(zip(energy.energies(feasible), feasible, strict=True)))


def _one_step_from(centre: Removal, problem: Problem) -> list[Removal]:
    """Removals that differ in one swap; where the number of units is open, also with one fewer or one more."""
    others = [unit for unit in range(len(problem.energy)) if unit not in centre]
    fewer = [tuple(i for i in centre if i != out) for out in centre]
    steps = [tuple(sorted((*rest, unit))) for rest in fewer for unit in others]
    if problem.budget is None:
        steps += [*fewer, *(tuple(sorted((*centre, unit))) for unit in others)]
    return steps
