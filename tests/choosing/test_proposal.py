"""What a criterion answers: rankings, what a smaller budget would have taken, what is left, what it cost."""

import time

import numpy as np
import pytest

from excise.choosing.brief import Brief
from excise.choosing.proposal import (
    Cost,
    Meter,
    Proposal,
    at_smaller_budget,
    by_scores,
    lowest,
    ranking,
    sublayer_budget,
    sublayer_proposal,
)
from excise.models.stack import find_stack
from excise.surgery.checkpoint import pruned
from tests.contexts import context_of
from tests.tiny import tiny_model

LAYERS = 6


@pytest.fixture(scope="module")
def stack():
    return find_stack(tiny_model("llama", LAYERS))


@pytest.mark.parametrize(
    ("scores", "candidates", "expected"),
    [
        ((3, 1, 2, 0), (0, 1, 2, 3), (3, 1, 2)),
        ((3, 1, 2, 0), (0, 1, 2), (1, 2, 0)),
        ((1, 0, 0, 1), (3, 2, 1, 0), (1, 2, 0)),
        ((np.nan, 5, np.nan, np.inf), (0, 1, 2, 3), (1, 3, 0)),
    ],
    ids=["smallest first", "candidates only", "ties to the lower index", "NaN last"],
)
def test_rankings(scores, candidates, expected):
    scores = np.array(scores, dtype=float)
    assert ranking(scores, 3, candidates) == expected
    assert lowest(scores, 3, candidates) == tuple(sorted(expected))


def test_scores_give_a_proposal_of_what_the_brief_allows(stack):
    scores = np.array([0.1, 0.6, 0.2, 0.5, 0.3, 0.4])
    proposal = by_scores("method", scores, Brief(2, protected=(0,)), context_of(stack), Cost(7.0))
    assert proposal == Proposal("method", (2, 4), tuple(scores), (2, 4), Cost(7.0))


TRAIL = (Cost(10.0, 0.0, 1.0), Cost(18.0, 0.0, 2.5), Cost(24.0, 0.0, 3.0))


def test_a_smaller_budget_takes_the_first_of_the_order_and_pays_for_them_alone(stack):
    whole = Proposal("greedy", (1, 3, 4), None, (4, 1, 3), Cost(24.0, 5.0, 3.0), trail=TRAIL, note="of three")
    smaller = at_smaller_budget(whole, stack, 2)
    assert (smaller.removed, smaller.order, smaller.note) == ((1, 4), (4, 1), "")
    assert smaller.cost == Cost(18.0, 5.0, 2.5)  # its only backward pass came before the first block went
    assert at_smaller_budget(smaller, stack, 1) == at_smaller_budget(whole, stack, 1)
    assert at_smaller_budget(whole, stack, 3) is whole
    assert at_smaller_budget(whole, stack, 4) is None


def test_where_one_pass_ranks_all_a_smaller_budget_costs_the_same(stack):
    whole = Proposal("ranked", (1, 3, 4), (6.0, 2.0, 5.0, 3.0, 1.0, 4.0), (4, 1, 3), Cost(24.0))
    assert at_smaller_budget(whole, stack, 1) == Proposal("ranked", (4,), whole.scores, (4,), Cost(24.0))


def test_without_an_order_a_smaller_budget_is_another_search(stack):
    assert at_smaller_budget(Proposal("window", (2, 3, 4)), stack, 2) is None


def test_sublayers_take_whole_blocks_where_nothing_of_them_is_left(stack):
    trail = tuple(Cost(float(i)) for i in range(1, 5))
    whole = sublayer_proposal("apart", stack, (5, 0, 4, 1), (None,) * 12, trail[-1], trail)
    assert (whole.removed, whole.sublayers, whole.order) == ((0, 2), (0, 1, 4, 5), (5, 0, 4, 1))
    assert not whole.dropped
    assert sublayer_budget(stack, 2) == 4
    smaller = at_smaller_budget(whole, stack, 1)
    assert (smaller.removed, smaller.sublayers, smaller.cost) == ((), (0, 5), Cost(2.0))


def test_blocks_of_one_sublayer_count_as_one():
    hybrid = find_stack(tiny_model("nemotron_h", LAYERS))
    assert [len(block.sublayers) for block in hybrid.blocks] == [1] * LAYERS
    assert sublayer_budget(hybrid, 3) == 3


def test_gates_and_parameters_are_those_of_what_goes(stack):
    attention = sum(p.numel() for p in stack.blocks[0].module.self_attn.parameters())
    with pruned(stack, (2,)) as model:
        left = sum(p.numel() for p in model.parameters())
    dropped, apart = Proposal("a", (2,)), Proposal("b", (2,), sublayers=(0, 4, 5))
    assert dropped.gates(stack) == (4, 5)
    assert apart.gates(stack) == (0, 4, 5)
    assert dropped.parameters_left(stack) == left
    # With its block still there, a sublayer takes its own weights along and no norm.
    assert apart.parameters_left(stack) == left - attention


@pytest.mark.parametrize(
    ("proposal", "dropped"),
    [
        (Proposal("a", (1,)), True),
        (Proposal("a", (1,), merge="figure"), False),
        (Proposal("a", (), sublayers=(3,)), False),
    ],
)
def test_only_whole_blocks_are_dropped(proposal, dropped):
    assert proposal.dropped is dropped


def test_a_pass_found_in_the_store_counts_with_the_seconds_it_had_taken(stack):
    context = context_of(stack)
    context.store.reused_seconds = 50.0  # of others, before
    started, meter = time.perf_counter(), Meter(context)
    context.store.reused_seconds += 100.0
    cost = meter.cost(12.0)
    assert cost.forward_tokens == 12.0
    assert 100.0 <= cost.seconds <= 100.0 + time.perf_counter() - started
