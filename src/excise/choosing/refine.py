"""From a model to a removal of little measured damage: singles, the refinement loop, and a race on more tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from excise.artefacts import read_json, write_json
from excise.choosing.search import Removal, Search, search
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.energies.pairs import pairs
from excise.ising.problem import Problem
from excise.measuring.objectives import Objective
from excise.models.identity import model_identity
from excise.models.removable import block_problem
from excise.models.stack import Stack
from excise.provenance import provenance

DEFAULT_EFFORT = 4.0
RACE_SHARE = 0.3
FINALISTS, STAGES = 8, 2
BATCH = 8
ANCHORS = 8
SHARED = 0.55  # of a full forward pass that a removal costs along the trie, about
MOST_ROUNDS, GOOD_ROUNDS, FEWEST_ROUNDS = 12, 5, 2
LEAST_SLICE = 128
SHOWN_STATES = 100

Measured = dict[Removal, tuple[float, float]]


@dataclass(frozen=True)
class Plan:
    """How an effort is spent.

    Attributes:
        slice_tokens: tokens of the samples that the loop measures on.
        rounds: of the loop.
        race_tokens: tokens of the samples of each stage of the race, FINALISTS, half of them, and so on.

    """

    slice_tokens: int
    rounds: int
    race_tokens: tuple[int, ...]

    def measurements(self, units: int) -> int:
        """Tokens × removals measured, about, for a progress bar.

        Args:
            units: removable blocks.

        """
        loop = self.slice_tokens * (1 + units + ANCHORS + self.rounds * BATCH)
        return loop + sum(t * (1 + max(1, FINALISTS >> stage)) for stage, t in enumerate(self.race_tokens))


@dataclass(frozen=True)
class Finalist:
    """A removal in the race.

    Attributes:
        removed: sorted original indices.
        predicted: posterior mean of its damage after the loop, nats.
        damage: measured on the samples of the last stage that it reached, nats.
        error: standard error of `damage`, nats.
        tokens: of those samples.

    """

    removed: Removal
    predicted: float
    damage: float
    error: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Refined:
    """What refinement found.

    Attributes:
        removed: the winner.
        finalists: those of the race, the winner first.
        search: the loop with all it measured.
        random_rho: Spearman's ρ of predicted and measured damage over random removals, each predicted from all other
            measurements; None for fewer than four.
        low_rho: the same over what the loop proposed, each predicted before it was measured.
        anchors: (predicted, measured) of those random removals, nats.
        forward_tokens: cost, in tokens through the whole intact stack.
        seconds: wall time of this call.
        plan: how the effort was spent.

    """

    removed: Removal
    finalists: tuple[Finalist, ...]
    search: Search
    random_rho: float | None
    low_rho: float | None
    anchors: tuple[tuple[float, float], ...]
    forward_tokens: float
    seconds: float
    plan: Plan

    def energy(self) -> Energy:
        """The fitted energy, in nats."""
        return self.search.fitted.energy()

    def to_json(self) -> dict[str, Any]:
        """Plain values: what a report shows and `excise refine` writes."""
        return {
            "removed": list(self.removed),
            "finalists": [asdict(f) for f in self.finalists],
            "rounds": [asdict(r) for r in self.search.rounds],
            "measured": [
                {"removed": list(r), "damage": d, "error": e} for r, (d, e) in sorted(self.search.damages.items())
            ],
            "spectrum": [
                {"removed": list(s.removed), "energy": s.energy} for s in self.search.spectrum.states[:SHOWN_STATES]
            ],
            "certified": self.search.spectrum.certified,
            "random_rho": self.random_rho,
            "low_rho": self.low_rho,
            "anchors": [list(pair) for pair in self.anchors],
            "forward_tokens": self.forward_tokens,
            "seconds": self.seconds,
            "plan": asdict(self.plan),
        }


def no_energy(units: int) -> Energy:
    """The energy that is 0 everywhere."""
    return Energy(None, np.zeros((units, units)))


def refinement_facts(
    found: Mapping[int, Refined], objective: Objective, effort: float, calibration: Samples
) -> dict[str, Any]:
    """What `candidates.json` says of refinements at several budgets."""
    return {
        "objective": objective.name,
        "effort": effort,
        "calibration": calibration.describe(),
        "budgets": {str(budget): refined.to_json() for budget, refined in sorted(found.items())},
        "provenance": provenance(),
    }


def plan(units: int, removed: int, tokens: float) -> Plan:
    """Divide a number of forward tokens among singles, rounds and race.

    The loop gets as many tokens a measurement as leave it five rounds, and no fewer than two rounds.

    Args:
        units: removable blocks.
        removed: budget M.
        tokens: forward tokens to spend.

    Examples:
        >>> plan(units=30, removed=8, tokens=40_000)
        Plan(slice_tokens=512, rounds=8, race_tokens=(1086, 2172))

    """
    share = SHARED * (units - removed) / units + 0.1
    opening = 0.55 * units + ANCHORS * share
    searching, racing = (1 - RACE_SHARE) * tokens, RACE_SHARE * tokens
    slice_tokens = LEAST_SLICE
    while searching / (2 * slice_tokens) >= opening + GOOD_ROUNDS * BATCH * share:
        slice_tokens *= 2
    rounds = math.floor((searching / slice_tokens - opening) / (BATCH * share))
    intact = 2**STAGES - 1  # passes of the intact model over as many tokens as the first stage has
    first = max(slice_tokens, round(racing / (STAGES * FINALISTS * share + intact)))
    return Plan(
        slice_tokens,
        min(MOST_ROUNDS, max(FEWEST_ROUNDS, rounds)),
        tuple(first * 2**stage for stage in range(STAGES)),
    )


def refine(
    stack: Stack,
    objective: Objective,
    budget: int,
    *,
    tokens: float,
    prior: Energy | None = None,
    protected: Sequence[int] = (),
    forced: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Refined:
    """Find `budget` blocks whose removal does little measured damage.

    Single removals and a few random ones are measured on a small slice of the samples; the loop of
    `excise.choosing.search` follows, on the same slice; its best go through a race on more and more of the samples,
    half of them dropped at each stage (successive halving, on the same tokens and so with paired differences).

    Args:
        stack: the model.
        objective: the damage, on all samples that may be used.
        budget: number M of blocks to remove.
        tokens: what to spend, about, in forward tokens.
        prior: what is believed before, in nats; by default the measured single removals.
        protected: blocks that stay.
        forced: blocks that go; they count towards the budget.
        seed: of everything random.
        work: folder in which every measurement and proposal is kept. An interrupted search goes on, and what was
            measured on the same slice for another budget is used for this one.
        advance: called with tokens × removals measured.

    Raises:
        InputError: the budget does not fit, or no removal has a finite damage.

    """
    started = time.perf_counter()
    units = len(stack.blocks)
    problem = block_problem(stack, no_energy(units), budget, protected, forced)
    spent = plan(len(problem.free), budget, tokens)
    few = objective.first_tokens(spent.slice_tokens)
    ledger = work / "measurements" if work else None
    state = _open_state(stack, work, few, problem, seed, lambda: few.known(stack, ledger))
    cost: dict[tuple[int, Removal], float] = {}

    def measured(samples: Objective, removals: Sequence[Removal]) -> Measured:
        damages = samples.damages(stack, [(), *removals], ledger=ledger, advance=advance)
        cost.update({(samples.tokens, r): c for r, c in zip(damages.removals, damages.costs.tolist(), strict=True)})
        rows = zip(damages.removals, damages.values.tolist(), damages.errors.tolist(), strict=True)
        return {removed: (damage, error) for removed, damage, error in rows if removed}

    singles = [(i,) for i in problem.free]
    anchors = _random_removals(problem, ANCHORS, seed)
    known = measured(few, [*singles, *anchors, *state.known])
    believed = prior or pairs({r: known[r][0] for r in singles}, units)
    found = search(
        partial(measured, few),
        believed,
        problem,
        rounds=spent.rounds,
        batch=BATCH,
        known=known,
        seed=seed,
        recorded=state.rounds,
        record=state.record,
    )
    finalists = _race(found, objective, budget, spent, measured)
    left_out = _left_out(found, anchors)
    proposed = [pair for r in found.rounds for pair in zip(r.predicted, r.measured, strict=True)]
    return Refined(
        finalists[0].removed,
        tuple(finalists),
        found,
        _rho(left_out),
        _rho(proposed),
        tuple(left_out),
        sum(cost.values()),
        time.perf_counter() - started,
        spent,
    )


@dataclass
class _State:
    """What a search had proposed when it was interrupted, and what was known before it began."""

    path: Path | None
    key: dict[str, Any]
    known: list[Removal]
    rounds: list[list[Removal]]

    def record(self, proposed: Sequence[Removal]) -> None:
        """Keep the removals of a round."""
        self.rounds.append(list(proposed))
        self.save()

    def save(self) -> None:
        """Write it, if it has a place."""
        if self.path:
            write_json(self.path, {"key": self.key, "known": self.known, "rounds": self.rounds})


def _open_state(
    stack: Stack,
    work: Path | None,
    few: Objective,
    problem: Problem,
    seed: int,
    known: Callable[[], Sequence[Removal]],
) -> _State:
    key = {
        "model_hash": model_identity(stack.model),
        "objective": few.name,
        "samples": [term.samples.hash for term in few.terms],
        "domains": [term.domains for term in few.terms],
        "protected": list(problem.protected),
        "forced": list(problem.forced),
    }
    path = work / f"refine-{problem.budget}-{seed}.json" if work else None
    if path and path.exists() and (kept := read_json(path))["key"] == key:
        rounds = [[tuple(removed) for removed in proposed] for proposed in kept["rounds"]]
        return _State(path, key, [tuple(removed) for removed in kept["known"]], rounds)
    fixed = {*problem.protected}
    state = _State(path, key, [r for r in known() if r and fixed.isdisjoint(r)], [])
    state.save()
    return state


def _race(
    found: Search,
    objective: Objective,
    budget: int,
    spent: Plan,
    measured: Callable[[Objective, Sequence[Removal]], Measured],
) -> list[Finalist]:
    """Successive halving; returns all that took part, those that came further first, then by damage."""
    candidates = found.best(budget, 4 * FINALISTS)
    if not candidates:
        raise InputError(f"no removal of {budget} blocks has a finite damage; try --dtype float32")
    predicted = dict(zip(candidates, found.fitted.energy().energies(candidates), strict=True))
    running = sorted(candidates, key=predicted.__getitem__)[:FINALISTS]
    running = list(dict.fromkeys([candidates[0], *running]))[:FINALISTS]
    results: dict[Removal, Finalist] = {}
    for tokens in spent.race_tokens:
        samples = objective.first_tokens(tokens)
        for removed, (damage, error) in measured(samples, running).items():
            results[removed] = Finalist(removed, predicted[removed], damage, error, samples.tokens)
        running.sort(key=lambda removed: (not math.isfinite(results[removed].damage), results[removed].damage))
        running = running[: max(1, len(running) // 2)] if tokens != spent.race_tokens[-1] else running
    return sorted(results.values(), key=lambda f: (-f.tokens, not math.isfinite(f.damage), f.damage))


def _left_out(found: Search, removals: Sequence[Removal]) -> list[tuple[float, float]]:
    """(predicted from all other measurements, measured) of removals."""
    kept = [removed for removed, (damage, _) in found.damages.items() if math.isfinite(damage)]
    predicted = dict(zip(kept, found.fitted.leave_one_out()[0].tolist(), strict=True))
    return [(predicted[r], found.damages[r][0]) for r in removals if r in predicted]


def _rho(points: Sequence[tuple[float, float]]) -> float | None:
    finite = [point for point in points if all(map(math.isfinite, point))]
    if len(finite) < 4:
        return None
    rho = float(spearmanr(*zip(*finite, strict=True)).statistic)
    return rho if math.isfinite(rho) else None


def _random_removals(problem: Problem, count: int, seed: int) -> list[Removal]:
    generator = np.random.default_rng((seed, 7))
    wanted = (problem.budget or 0) - len(problem.forced)
    draws = (generator.choice(problem.free, wanted, replace=False) for _ in range(4 * count))
    removals = [tuple(sorted((*problem.forced, *map(int, draw)))) for draw in draws]
    return [removed for removed in dict.fromkeys(removals) if problem.allows(removed)][:count]
