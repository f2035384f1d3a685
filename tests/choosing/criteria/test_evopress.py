"""EvoPress: its invariants on made-up fitnesses, its fitness against a naive divergence, its answer against all."""

from __future__ import annotations

import itertools
import random

import pytest

from excise.choosing.criteria import CRITERIA
from excise.choosing.criteria.evopress import PUBLISHED, SCALED_DOWN, Schedule, evolve
from excise.measuring.measure import measure
from excise.models.stack import find_stack
from excise.progress import Progress
from tests.choosing.criteria.naive import FLOAT32_NORM, MODELS, divergence, uneven_model, without
from tests.contexts import Shown, chosen, context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

SAMPLES = random_samples((9, 5, 14), seed=5)
CANDIDATES = [1, 2, 4, 5, 7, 8, 9, 11, 12, 15]


class Rugged:
    """A seeded random fitness with interactions; noise, if any, differs from call to call as minibatches do."""

    def __init__(self, seed, noise=0.0):
        self.generator, self.noise, self.calls = random.Random(seed), noise, []
        self.pairs = {
            pair: self.generator.gauss(0, 1) for pair in itertools.combinations_with_replacement(range(16), 2)
        }

    def value(self, removal):
        return sum(self.pairs[pair] for pair in itertools.combinations_with_replacement(removal, 2))

    def __call__(self, removals, tokens):
        self.calls.append((len(removals), tokens))
        shift = self.noise * self.generator.gauss(0, 1)
        return [self.value(removal) + shift for removal in removals]


@pytest.mark.parametrize("schedule", [PUBLISHED, SCALED_DOWN, Schedule(3, 10, 5, 2, ((3, 10), (2, 20), (1, 30)), 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_invariants(schedule, seed):
    fitness = Rugged(seed)
    generations = evolve(fitness, CANDIDATES, 4, schedule, random.Random(seed))
    assert len(generations) == schedule.generations(4, 6)
    for before, after in itertools.pairwise(generations):
        assert after.parent == before.survivor
    for generation in generations:
        for removal in (generation.parent, *generation.offspring, generation.survivor):
            assert len(set(removal)) == 4  # the exact count
            assert set(removal) <= set(CANDIDATES)
            assert list(removal) == sorted(removal)
        assert len(set(generation.offspring)) == len(generation.offspring) == schedule.offspring
        assert generation.parent not in generation.offspring
        for child in generation.offspring:
            assert 1 <= len(set(generation.parent) - set(child)) <= schedule.most_swaps
        assert generation.survivor in (generation.parent, *generation.offspring)
        assert generation.survivor_fitness <= generation.parent_fitness  # elitism
    fitnesses = [fitness.value(g.parent) for g in generations] + [fitness.value(generations[-1].survivor)]
    assert fitnesses == sorted(fitnesses, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_published_schedule_finds_the_best_of_a_small_space_from_a_poor_start(seed):
    fitness = Rugged(seed)
    generations = evolve(fitness, CANDIDATES, 4, Schedule(starts=1), random.Random(seed))
    best = min(itertools.combinations(CANDIDATES, 4), key=fitness.value)
    assert generations[0].parent != best
    assert generations[-1].survivor == best


def test_selections_follow_the_schedule():
    fitness = Rugged(0)
    evolve(fitness, CANDIDATES, 4, PUBLISHED, random.Random(0))
    starts, *rest = fitness.calls
    assert starts[1] == 2048
    assert 55 <= starts[0] <= 64  # a few of 64 draws out of 210 sets coincide
    assert rest == [(32, 2048), (3, 32768)] * PUBLISHED.generations(4, 6)


def test_a_noisy_minibatch_never_replaces_a_parent_by_a_worse_child_on_it():
    fitness = Rugged(1, noise=5.0)
    generations = evolve(fitness, CANDIDATES, 4, SCALED_DOWN, random.Random(1))
    assert all(g.survivor_fitness <= g.parent_fitness for g in generations)
    values = [fitness.value(g.survivor) for g in generations]
    assert values == sorted(values, reverse=True)


def test_not_a_number_never_wins():
    generations = evolve(
        lambda removals, tokens: [float("nan") if 5 in r else float(sum(r)) for r in removals],
        CANDIDATES,
        3,
        PUBLISHED,
        random.Random(0),
    )
    assert generations[-1].survivor == (1, 2, 4)


@pytest.mark.parametrize("model_type", MODELS)
def test_fitness_is_the_divergence_and_the_best_of_all_is_found(model_type):
    model = uneven_model(model_type, 6)
    removals = list(itertools.combinations(range(6), 2))
    expected = [divergence(model, without(model, removal), SAMPLES) for removal in removals]
    stack = find_stack(model)
    before = traces(model)
    measured = measure(context_of(stack), SAMPLES, removals, statistic="divergence")
    assert measured.losses == pytest.approx(expected, rel=10 * FLOAT32_NORM)
    assert chosen(CRITERIA["evopress"], stack, SAMPLES, 2).removed == removals[expected.index(min(expected))]
    assert traces(model) == before


@pytest.mark.parametrize("method", ["evopress", "evopress-scaled-down"])
def test_seeded(method):
    samples = random_samples((120,) * 6, seed=1)  # more tokens than a first minibatch of the scaled-down schedule
    stack = find_stack(tiny_model("llama", 6))
    first, again = (chosen(CRITERIA[method], stack, samples, 2, seed=4) for _ in range(2))
    assert (first.removed, first.cost.forward_tokens) == (again.removed, again.cost.forward_tokens)
    assert first.cost.forward_tokens > 0


def test_minibatches_are_drawn_and_counted():
    samples = random_samples((100,) * 12, seed=1)
    stack, shown = find_stack(tiny_model("llama", 6)), Shown()
    selection = chosen(CRITERIA["evopress-scaled-down"], stack, samples, 1, progress=Progress(shown))
    done = shown.done
    assert all(tokens % 100 == 0 for tokens in done)
    assert 600 < selection.cost.forward_tokens < sum(done) + 100 * 12 * 10
    assert len(selection.removed) == 1
