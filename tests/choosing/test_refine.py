"""Refinement of a tiny model: exhaustive truth, resumption, reuse between budgets."""

import itertools
import json

import numpy as np
import pytest

from excise.choosing.brief import Brief
from excise.choosing.objectives import parse_objective
from excise.choosing.plan import plan
from excise.choosing.refine import refine
from excise.errors import InputError
from excise.models.identity import model_identity
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import uneven_model
from tests.contexts import context_of
from tests.random_samples import random_samples

LAYERS, BUDGET = 8, 3


@pytest.fixture(scope="module")
def stack():
    return find_stack(uneven_model("llama", LAYERS))


@pytest.fixture(scope="module")
def objective():
    return parse_objective("kl", random_samples(range(12, 40), seed=2))


def refined(stack, objective, budget, *, tokens, folder=None, told=None, alone=False, **brief):
    """Refinement of a stack in memory."""
    asked = Brief.on(stack, budget, **brief)
    return refine(context_of(stack, folder, told), objective, asked, tokens=tokens, alone=alone)


def test_finds_the_best_of_all_removals(stack, objective):
    removals = list(itertools.combinations(range(LAYERS), BUDGET))
    truth = objective.damages(context_of(stack), removals)
    found = refined(stack, objective, BUDGET, tokens=12_000, seed=0)
    assert found.removed == truth.removals[int(np.argmin(truth.values))]
    assert found.forward_tokens < 14_000
    assert found.low_rho is not None
    assert found.finalists[0].removed == found.removed
    for finalist in found.finalists:
        damages = objective.first_tokens(finalist.tokens).damages(context_of(stack), [finalist.removed])
        assert finalist.domains == pytest.approx(damages.domains[0])
    assert [f.tokens for f in found.finalists] == sorted((f.tokens for f in found.finalists), reverse=True)


def test_interrupted_and_resumed_equals_uninterrupted(stack, objective, tmp_path):
    whole = refined(stack, objective, BUDGET, tokens=8_000, seed=1)
    calls = []

    def stop_later(tokens):
        calls.append(tokens)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refined(stack, objective, BUDGET, tokens=8_000, seed=1, folder=tmp_path, told=stop_later)
    resumed = refined(stack, objective, BUDGET, tokens=8_000, seed=1, folder=tmp_path)
    assert resumed.removed == whole.removed
    assert resumed.finalists == whole.finalists
    assert resumed.low_rho == whole.low_rho
    assert resumed.forward_tokens == pytest.approx(whole.forward_tokens, rel=1e-9)


def test_every_round_measures_on_the_next_slice(stack, objective):
    found = refined(stack, objective, BUDGET, tokens=8_000)
    slices = objective.slices(found.plan.slice_tokens)
    assert len(slices) > 2
    turns = [{found.search.damages[removed].slice for removed in r.proposed} for r in found.search.rounds]
    assert turns == [{(number + 1) % len(slices)} for number in range(len(turns))]
    assert {found.search.damages[(block,)].slice for block in range(LAYERS)} == {0}
    for number in {0, 1}:
        removals = [removed for removed, measured in found.search.damages.items() if measured.slice == number]
        damages = slices[number].damages(context_of(stack), removals)
        assert [found.search.damages[r].damage for r in damages.removals] == pytest.approx(damages.values.tolist())
    told = found.to_json()["measured"]
    assert {each["slice"] for each in told} > {0, 1}
    assert {tuple(each["removed"]): each["compared"] for each in told} == found.search.compared()


def test_measurements_serve_other_budgets(stack, objective, tmp_path):
    first = refined(stack, objective, BUDGET, tokens=8_000, folder=tmp_path)
    other = refined(stack, objective, BUDGET + 1, tokens=8_000, folder=tmp_path)
    assert {len(removed) for removed in other.search.damages} >= {1, BUDGET, BUDGET + 1}
    assert first.plan.slice_tokens == other.plan.slice_tokens
    assert all(other.search.damages[removed] == measured for removed, measured in first.search.damages.items())
    assert len(other.removed) == BUDGET + 1


def test_another_model_or_objective_in_the_folder_starts_its_own_search(stack, objective, tmp_path):
    refined(stack, objective, BUDGET, tokens=8_000, folder=tmp_path)
    other = find_stack(uneven_model("llama", LAYERS, seed=5))
    worst = parse_objective("kl", objective.terms[0].samples, domains="worst")
    for model, damage in ((other, objective), (stack, worst)):
        alone = refined(model, damage, BUDGET, tokens=8_000)
        beside = refined(model, damage, BUDGET, tokens=8_000, folder=tmp_path)
        if model is other:
            assert [r.proposed for r in beside.search.rounds] == [r.proposed for r in alone.search.rounds]
    kept = [json.loads(path.read_text())["key"] for path in (tmp_path / "searches").iterdir()]
    assert len(kept) == 3
    assert {key["model_hash"] for key in kept} == {model_identity(model.model) for model in (stack, other)}


def test_alone_it_finds_what_it_would_in_a_folder_of_its_own_and_measures_nothing_twice(stack, objective, tmp_path):
    first = refined(stack, objective, BUDGET, tokens=8_000, folder=tmp_path)
    forwards = []
    handle = stack.model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    empty = refined(stack, objective, BUDGET + 1, tokens=8_000)
    needed = len(forwards)
    beside = refined(stack, objective, BUDGET + 1, tokens=8_000, folder=tmp_path, alone=True)
    handle.remove()
    assert beside.finalists == empty.finalists
    assert beside.forward_tokens == pytest.approx(empty.forward_tokens, rel=1e-9)
    assert needed > len(forwards) - needed  # the singles were there
    assert first.plan.slice_tokens == beside.plan.slice_tokens


def test_protected_blocks_stay_and_forced_ones_go(stack, objective):
    found = refined(stack, objective, BUDGET, tokens=6_000, protected=(0, 7), forced=(2,))
    for finalist in found.finalists:
        assert 2 in finalist.removed
        assert not {0, 7} & set(finalist.removed)


def test_a_plan_spends_what_it_is_given():
    small, large = plan(30, 8, 8_000), plan(30, 8, 200_000)
    assert small.slice_tokens < large.slice_tokens
    assert small.rounds >= 2
    assert large.rounds >= 5
    assert large.race_tokens == (large.race_tokens[0], 2 * large.race_tokens[0])
    assert large.race_tokens[0] > large.slice_tokens
    share = 0.65  # of a pass that a removal of 8 of 30 blocks takes at most, prefixes shared
    racing = sum(t * (1 + share * count) for t, count in zip(large.race_tokens, (8, 4), strict=True))
    looping = large.slice_tokens * (1 + 15 + share * 8 * (1 + large.rounds))
    assert 0.8 * 200_000 < racing + looping < 1.25 * 200_000
    # More effort buys removals before it buys tokens for each.
    for tokens in (250_000, 400_000, 600_000, 2_000_000):
        more = plan(30, 8, tokens)
        assert more.slice_tokens >= large.slice_tokens
        assert more.rounds > large.rounds
    assert plan(30, 8, 2_000_000).slice_tokens > large.slice_tokens
    # Where every round reads all weights, as many removals in fewer rounds.
    for tokens in (1_000, 8_000, 40_000, 80_000, 200_000):
        one, other = plan(30, 8, tokens), plan(30, 8, tokens, streamed=True)
        assert one.rounds * one.batch - one.batch < other.rounds * other.batch <= one.rounds * one.batch
    streamed = plan(30, 8, 200_000, streamed=True)
    assert streamed.slice_tokens == large.slice_tokens
    assert streamed.rounds < large.rounds / 2
    assert 0.8 < streamed.rounds * streamed.batch / (large.rounds * large.batch) < 1.2


def test_a_budget_that_does_not_fit_is_refused(stack, objective):
    with pytest.raises(InputError, match="between 1 and 7: 8 blocks"):
        refined(stack, objective, 9, tokens=1_000)
