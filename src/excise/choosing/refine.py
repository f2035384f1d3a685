"""From a model to a removal of little measured damage: singles, the refinement loop, and a race on more tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy.stats import spearmanr

from excise.artefacts import digest
from excise.artefacts.provenance import provenance
from excise.choosing.brief import Brief, no_energy
from excise.choosing.objectives import Objective
from excise.choosing.plan import ANCHORS, FINALISTS, Plan, plan
from excise.choosing.proposal import Proposal
from excise.choosing.search import Measured, Search, search
from excise.context import Context
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.energies.pairs import pairs
from excise.ising.problem import Problem, Removal
from excise.ising.solvers.kernels import random_state
from excise.ising.solvers.places import open_states
from excise.measuring.passes import pass_key
from excise.measuring.sweep import sweeps
from excise.plain import Facts

SEARCHES = "searches"
# Of removals on some samples, which are those of a slice's number.
_Measure = Callable[[Objective, Sequence[Removal], int], dict[Removal, Measured]]


@dataclass(frozen=True)
class Finalist:
    """A removal in the race.

    Attributes:
        removed: sorted original indices.
        predicted: posterior mean of its damage after the loop, nats.
        damage: measured on the samples of the last stage that it reached, nats.
        error: standard error of `damage`, nats.
        tokens: of those samples.
        domains: `damage` in each of their categories.

    """

    removed: Removal
    predicted: float
    damage: float
    error: float
    tokens: int
    domains: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Refined:
    """What refinement found.

    Attributes:
        removed: the winner.
        finalists: those of the race, the winner first.
        search: the loop with all it measured.
        random_rho: Spearman's ρ of predicted and measured damage over random removals, each predicted from all other
            measurements; None for fewer than four.
        low_rho: the same over what the loop proposed.
        anchors: (predicted, measured) of those random removals, nats.
        forward_tokens: cost, in tokens through the whole intact stack.
        seconds: wall time of this call.
        plan: how the effort was spent.
        distributions: from which divergences of the finalists were taken, see
            `excise.measuring.measure.Measurements`; empty where the objective has none.

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
    distributions: Facts

    def energy(self) -> Energy:
        """The fitted energy, in nats."""
        return self.search.fitted.energy()

    def proposals(self) -> list[Proposal]:
        """The finalists, as proposals of `refined:k`, the winner first."""
        return [Proposal(f"refined:{k}", finalist.removed) for k, finalist in enumerate(self.finalists)]

    def to_json(self) -> Facts:
        """Plain values: what a report shows and `excise refine` writes."""
        compared = self.search.compared()
        return {
            "removed": list(self.removed),
            "finalists": [asdict(f) for f in self.finalists],
            "rounds": [asdict(r) for r in self.search.rounds],
            "measured": [
                {"removed": list(removed), **measured._asdict(), "compared": compared[removed]}
                for removed, measured in sorted(self.search.damages.items())
            ],
            "spectrum": [{"removed": list(s.removed), "energy": s.energy} for s in self.search.spectrum.states],
            "certified": self.search.spectrum.certified,
            "random_rho": self.random_rho,
            "low_rho": self.low_rho,
            "anchors": [list(pair) for pair in self.anchors],
            "forward_tokens": self.forward_tokens,
            "seconds": self.seconds,
            "plan": asdict(self.plan),
            "distributions": self.distributions,
        }


def refinement_facts(found: Mapping[int, Refined], objective: Objective, effort: float, calibration: Samples) -> Facts:
    """What `candidates.json` says of refinements at several budgets."""
    return {
        "objective": objective.name,
        "repaired": objective.repaired,
        "effort": effort,
        "calibration": calibration.describe(),
        "budgets": {str(budget): refined.to_json() for budget, refined in sorted(found.items())},
        "provenance": provenance(),
    }


def refine(
    context: Context,
    objective: Objective,
    brief: Brief,
    *,
    tokens: float,
    prior: Energy | None = None,
    alone: bool = False,
) -> Refined:
    """Find blocks whose removal does little measured damage.

    Single removals and a few random ones are measured on a small slice of the samples; the loop of
    `excise.choosing.search` follows, each round on the next slice; its best go through a race on more and more of the
    samples, half of them dropped at each stage (successive halving, on the same tokens and so with paired differences).

    Args:
        context: the model and the store, in which every measurement and proposal is kept: an interrupted search goes
            on, and what was measured on the same slices for another budget is used for this one.
        objective: the damage, on all samples that may be used.
        brief: how many blocks go, which may not and which must.
        tokens: what to spend, about, in forward tokens.
        prior: what is believed before, in nats; by default the measured single removals.
        alone: begin without what was measured for other budgets; what is asked again is still not measured twice.

    Raises:
        InputError: the budget does not fit, or no removal has a finite damage.

    """
    started, units = time.perf_counter(), len(context.stack.blocks)
    brief.candidates(context.stack)
    problem = brief.problem(context.stack, no_energy(units))
    spent = plan(len(problem.free), brief.budget, tokens, streamed=sweeps(context.stack))
    # From one slice for all rounds the energy learns what its few samples say, however many removals are measured; from
    # one for each what they have in common (log, 2026-11-30, slices in turn).
    slices = objective.slices(spent.slice_tokens)
    state = _State.of(context, slices, problem, brief, prior, alone)
    cost: dict[tuple[str, Removal], float] = {}
    distributions: Facts = {}
    domains: dict[Removal, dict[str, float]] = {}

    def measured(samples: Objective, removals: Sequence[Removal], number: int) -> dict[Removal, Measured]:
        damages = samples.damages(context, [(), *removals])
        distributions.update(damages.distributions)
        # Of a finalist, those of the race's last stage that it reached.
        domains.update(zip(damages.removals, damages.domains, strict=True))
        key = digest(samples.identity)
        for removed, tokens_taken in zip(damages.removals, damages.costs.tolist(), strict=True):
            # What a removal costs depends on what it is measured with: the first time counts, the next ones are free.
            cost.setdefault((key, removed), tokens_taken)
        rows = zip(damages.removals, damages.values.tolist(), damages.errors.tolist(), strict=True)
        return {removed: Measured(damage, error, number) for removed, damage, error in rows if removed}

    def of_round(removals: Sequence[Removal], number: int) -> dict[Removal, Measured]:
        # The first slice is that of the singles; it has its turn again after all others.
        turn = (number + 1) % len(slices)
        return measured(slices[turn], removals, turn)

    singles = [(i,) for i in problem.free]
    anchors = _random_removals(problem, ANCHORS, brief.seed)
    most = "≤ " if brief.amounts else ""
    with context.progress.stage(f"refine, M = {most}{brief.budget}", spent.measurements(len(problem.free))):
        first = measured(slices[0], [*singles, *anchors], 0)
        found = search(
            of_round,
            # Measured singles carry the order of blocks; what they cannot know, the couplings, is what the loop learns.
            prior or pairs({r: first[r].damage for r in singles}, units),
            problem,
            rounds=spent.rounds,
            batch=spent.batch,
            known={**state.measured(measured), **first},
            diary=state,
        )
        # More tokens than the loop's, all the same for everyone, so that differences are paired.
        finalists = [
            replace(finalist, domains=domains[finalist.removed])
            for finalist in _race(found, objective, problem, spent, measured)
        ]
    anchored = found.left_out(anchors)
    proposed = [pair for r in found.rounds for pair in zip(r.predicted, r.measured, strict=True)]
    return Refined(
        finalists[0].removed,
        tuple(finalists),
        found,
        _rho(anchored),
        _rho(proposed),
        tuple(anchored),
        sum(cost.values()),
        time.perf_counter() - started,
        spent,
        distributions,
    )


@dataclass(frozen=True)
class _State:
    """What a search had proposed when it was interrupted, and what was known before it began."""

    context: Context
    key: Facts
    slices: tuple[Objective, ...]
    known: list[list[Removal]]
    rounds: list[list[Removal]]

    @staticmethod
    def of(
        context: Context,
        slices: tuple[Objective, ...],
        problem: Problem,
        brief: Brief,
        prior: Energy | None,
        alone: bool,
    ) -> _State:
        """What the store has of this search, or its beginning."""
        key = {
            **pass_key(context, slices[0].terms[0].samples, {}),
            "slices": [each.identity for each in slices],
            "brief": asdict(brief),
            "prior": None if prior is None else digest([prior.h.tolist(), prior.J.tolist()]),
            "alone": alone,
        }
        # Told by the first: of processes that find one and others that do not, some would ask for what is known alone.
        if kept := context.team.once(lambda: context.store.found(SEARCHES, key)):
            known, rounds = (
                [[tuple(removed) for removed in removals] for removals in kept[name]] for name in ("known", "rounds")
            )
            return _State(context, key, slices, known, rounds)
        fixed = {*problem.protected}
        # A method that is compared must pay for all it knows: `alone` begins without what others measured.
        known = [[] if alone else [r for r in each.known(context) if fixed.isdisjoint(r)] for each in slices]
        state = _State(context, key, slices, known, [])
        # What was known at the start shapes every proposal, so a resumed search must not begin from a fuller ledger.
        state._keep()
        return state

    def measured(self, measure: _Measure) -> dict[Removal, Measured]:
        """What was known before the search began; of what was measured on several slices, the first."""
        found: dict[Removal, Measured] = {}
        for number, (samples, removals) in enumerate(zip(self.slices, self.known, strict=True)):
            if fresh := [removed for removed in removals if removed not in found]:
                found |= measure(samples, fresh, number)
        return found

    def record(self, proposed: Sequence[Removal]) -> None:
        """Keep the removals of a round."""
        self.rounds.append(list(proposed))
        self._keep()

    def _keep(self) -> None:
        self.context.store.keep(SEARCHES, self.key, {"known": self.known, "rounds": self.rounds})


def _race(
    found: Search,
    objective: Objective,
    problem: Problem,
    spent: Plan,
    measured: _Measure,
) -> list[Finalist]:
    """Successive halving; returns all that took part, those that came further first, then by damage."""
    candidates = found.best(problem, 4 * FINALISTS)
    if not candidates:
        sizes = " or ".join(map(str, problem.counts()))
        raise InputError(f"no removal of {sizes} blocks has a finite damage; try --dtype float32")
    predicted = dict(zip(candidates, found.fitted.energy().energies(candidates), strict=True))
    # By the posterior mean: of many measured values the least is partly luck, and the fit averages luck out.
    running = sorted(candidates, key=predicted.__getitem__)[:FINALISTS]
    # The one measured best runs in any case, lest a poor fit throw it away.
    running = list(dict.fromkeys([candidates[0], *running]))[:FINALISTS]
    results: dict[Removal, Finalist] = {}
    for tokens in spent.race_tokens:
        samples = objective.first_tokens(tokens)
        for removed, told in measured(samples, running, 0).items():
            # Overwritten by the later stage, which is on more tokens.
            results[removed] = Finalist(removed, predicted[removed], told.damage, told.error, samples.tokens)
        running.sort(key=lambda removed: (not math.isfinite(results[removed].damage), results[removed].damage))
        running = running[: max(1, len(running) // 2)] if tokens != spent.race_tokens[-1] else running
    return sorted(results.values(), key=lambda f: (-f.tokens, not math.isfinite(f.damage), f.damage))


def _rho(points: Sequence[tuple[float, float]]) -> float | None:
    finite = [point for point in points if all(map(math.isfinite, point))]
    # Of three points every order is likely by chance.
    if len(finite) < 4:
        return None
    rho = float(spearmanr(*zip(*finite, strict=True)).statistic)
    return rho if math.isfinite(rho) else None


def _random_removals(problem: Problem, count: int, seed: int) -> list[Removal]:
    generator = np.random.default_rng((seed, 7))
    if problem.pattern is not None:
        # Hardly any draw keeps a pattern; those that do are enumerated at random instead.
        reduced = problem.reduced()
        drawn = (reduced.removed(state) for state in open_states(reduced, 4 * count, random_state(seed)))
        return [removed for removed in dict.fromkeys(drawn) if problem.allows(removed)][:count]
    wanted = [number - len(problem.forced) for number in problem.counts()]
    sizes = (wanted[k % len(wanted)] for k in range(4 * count * len(wanted)))
    draws = (generator.choice(problem.free, size, replace=False) for size in sizes)
    removals = [tuple(sorted((*problem.forced, *map(int, draw)))) for draw in draws]
    return [removed for removed in dict.fromkeys(removals) if problem.allows(removed)][:count]
