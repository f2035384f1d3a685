"""EvoPress, depth pruning (Sieberling et al., 2024, arXiv 2410.14649): (1 + λ) evolution of the set of removed blocks.

Fitness of a removal, the lower the better: KL(intact ‖ pruned) of the next-token distributions on calibration data. A
generation draws λ offspring of the parent, each by min(U{1..3}, U{1..3}) swaps of a removed for a kept block.
Selections on growing minibatches thin them out, and the parent joins the last one (elitism). The first parent is the
best of random starts.

Beyond the original: minibatches are whole samples, so they may exceed the wanted tokens by part of one; where all
samples together have no more tokens than wanted, all are used, and a removal already measured on them is not measured
again; offspring equal to the parent or to each other are drawn anew, up to ten draws for each, so that tiny search
spaces end; candidates that share their lowest blocks share the computation of those.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.problem import Removal
from excise.measuring.measure import measure

Fitness = Callable[
    [Sequence[Removal], int], Sequence[float]
]  # (removals, tokens of the minibatch) → the lower the better


@dataclass(frozen=True)
class Schedule:
    """Hyper-parameters of the evolution; the defaults are the published ones.

    Attributes:
        starts: random removals of which the best is the first parent.
        start_tokens: tokens they are measured on.
        offspring: λ, drawn a generation.
        most_swaps: an offspring differs from its parent by min(U{1..most_swaps}, U{1..most_swaps}) swaps.
        selections: (survivors, tokens) of each selection of a generation; the last must leave one.
        divisor: generations = M × (N − M) ÷ divisor, rounded up, for M of N blocks removed.
        passes: end after the generation in which so many passes over the samples have been spent; None for no end but
            that of the generations.

    """

    starts: int = 64
    start_tokens: int = 2048
    offspring: int = 32
    most_swaps: int = 3
    selections: tuple[tuple[int, int], ...] = ((2, 2048), (1, 32768))
    divisor: float = 1.5
    passes: float | None = None

    def generations(self, removed: int, kept: int) -> int:
        """Generations for a search space of that shape.

        Examples:
            >>> Schedule().generations(removed=8, kept=24)
            128

        """
        return math.ceil(removed * kept / self.divisor)


PUBLISHED = Schedule()
# Ends after 280 passes over the search tokens: five times what refinement spends at its default effort
# (docs/results.md).
SCALED_DOWN = Schedule(16, 512, 8, 3, ((2, 512), (1, 2048)), passes=280)


@dataclass(frozen=True)
class Generation:
    """One generation: who was there, and who survived.

    Attributes:
        parent: its removal.
        offspring: removals drawn from it.
        survivor: the next parent.
        parent_fitness: in the last selection.
        survivor_fitness: in the last selection; never above `parent_fitness` (elitism).

    """

    parent: Removal
    offspring: tuple[Removal, ...]
    survivor: Removal
    parent_fitness: float
    survivor_fitness: float


@dataclass(frozen=True)
class EvoPress:
    """Criterion that removes the blocks that evolve under a schedule.

    Attributes:
        method: its name.
        schedule: hyper-parameters.

    """

    method: str
    schedule: Schedule

    def __call__(self, context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
        """Evolve; minibatches are drawn of the samples, and the brief's seed is that of all randomness."""
        # A generator of its own: how many minibatches are drawn must not change which offspring are.
        fitness = _Divergence(context, samples, random.Random(f"minibatches {brief.seed}"))
        candidates, generator = brief.candidates(context.stack), random.Random(brief.seed)
        generations = evolve(fitness, candidates, brief.budget, self.schedule, generator, fitness.passes)
        return [Proposal(self.method, generations[-1].survivor, cost=Cost(fitness.forward_tokens))]


def evolve(
    fitness: Fitness,
    candidates: Sequence[int],
    budget: int,
    schedule: Schedule,
    generator: random.Random,
    passes: Callable[[], float] = lambda: 0.0,
) -> list[Generation]:
    """Run the evolution; the last survivor is the answer.

    Args:
        fitness: of removals, on a minibatch of so many tokens, drawn anew at each call.
        candidates: blocks that may go.
        budget: how many do, in every individual.
        schedule: hyper-parameters.
        generator: source of all randomness but the minibatches.
        passes: how many passes over the samples `fitness` has taken so far.

    Returns:
        The generations; where all candidates must go, a single one without offspring.

    """
    starts = [tuple(sorted(generator.sample(candidates, budget))) for _ in range(schedule.starts)]
    parent = _fittest(fitness, list(dict.fromkeys(starts)), 1, schedule.start_tokens)[0][1]
    generations: list[Generation] = []
    for number in range(max(1, schedule.generations(budget, len(candidates) - budget))):
        if schedule.passes is not None and number and passes() >= schedule.passes:
            break
        offspring = _offspring(parent, candidates, schedule, generator)
        pool = offspring
        for survivors, tokens in schedule.selections[:-1]:
            pool = [removal for _, removal in _fittest(fitness, pool, survivors, tokens)]
        ranked = _fittest(fitness, [parent, *pool], len(pool) + 1, schedule.selections[-1][1])
        parent_fitness = next(value for value, removal in ranked if removal == parent)
        value, survivor = ranked[0]
        generations.append(Generation(parent, tuple(offspring), survivor, parent_fitness, value))
        parent = survivor
    return generations


def _fittest(fitness: Fitness, pool: Sequence[Removal], count: int, tokens: int) -> list[tuple[float, Removal]]:
    """The best `count` of the pool with their fitness, best first; the earlier first where they tie."""
    if not pool:
        return []
    # A NaN compares with nothing; as infinity an overflow loses.
    values = np.nan_to_num(np.asarray(fitness(pool, tokens), dtype=float), nan=np.inf)
    order = np.argsort(values, kind="stable")[:count]
    return [(float(values[i]), pool[i]) for i in order]


def _offspring(
    parent: Removal, candidates: Sequence[int], schedule: Schedule, generator: random.Random
) -> list[Removal]:
    """Distinct mutations of `parent`, as many as the schedule wants or the draws allow."""
    if len(candidates) == len(parent):
        return []
    offspring: list[Removal] = []
    for _ in range(10 * schedule.offspring):
        if len(offspring) == schedule.offspring:
            break
        removal = set(parent)
        for _swap in range(min(generator.randint(1, schedule.most_swaps), generator.randint(1, schedule.most_swaps))):
            # Sorted, since the order of a set is an accident, and a seed must lead to one result.
            back = generator.choice(sorted(removal))
            gone = generator.choice([i for i in candidates if i not in removal])
            removal = removal - {back} | {gone}
        mutation = tuple(sorted(removal))
        if mutation != parent and mutation not in offspring:
            offspring.append(mutation)
    return offspring


class _Divergence:
    """Fitness on minibatches of the samples, counting its cost."""

    def __init__(self, context: Context, samples: Samples, generator: random.Random) -> None:
        self.forward_tokens = 0.0
        self._context, self._samples, self._generator = context, samples, generator
        self._on_all: dict[Removal, float] = {}
        self._seen: set[str] = set()

    def __call__(self, removals: Sequence[Removal], tokens: int) -> list[float]:
        if tokens < self._samples.tokens:
            return self._measure(removals, self._minibatch(tokens))
        new = [removal for removal in removals if removal not in self._on_all]
        if new:
            self._on_all |= dict(zip(new, self._measure(new, self._samples), strict=True))
        return [self._on_all[removal] for removal in removals]

    def passes(self) -> float:
        """Cost so far, in passes of the intact stack over all samples."""
        return self.forward_tokens / self._samples.tokens

    def _minibatch(self, tokens: int) -> Samples:
        drawn, total = [], 0
        for i in self._generator.sample(range(len(self._samples)), len(self._samples)):
            drawn.append(self._samples[i])
            total += len(self._samples[i].input_ids)
            if total >= tokens:
                break
        return Samples(tuple(drawn))

    def _measure(self, removals: Sequence[Removal], samples: Samples) -> list[float]:
        measured = measure(self._context, samples, removals, statistic="divergence")
        self.forward_tokens += measured.forward_tokens
        # The intact model's pass, which `measure` does not count.
        if samples.hash not in self._seen:
            self._seen.add(samples.hash)
            self.forward_tokens += samples.tokens
        return measured.losses.tolist()
