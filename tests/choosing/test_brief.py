"""What is asked of whoever chooses: indices, the one check of budgets, and the problem that follows."""

import itertools

import numpy as np
import pytest

from excise.choosing.brief import Brief
from excise.errors import ArchitectureError, InputError
from excise.ising.energies import Energy
from excise.ising.solvers import solve
from excise.models.stack import find_stack
from tests.tiny import tiny_model

LAYERS = 6


@pytest.fixture(scope="module")
def llama():
    return find_stack(tiny_model("llama", LAYERS))


@pytest.fixture(scope="module")
def gemma():
    """A model of which blocks 2, 3 and 5 are fixed."""
    return find_stack(tiny_model("gemma4_text", LAYERS))


def test_indices_may_count_from_the_top(llama):
    brief = Brief.on(llama, 3, protected=(-1, 0), forced=(-2, 1), seed=4)
    assert brief == Brief(3, (0, 5), (1, 4), 4)
    assert brief.candidates(llama) == [1, 2, 3, 4]


def test_blocks_that_others_depend_on_are_no_candidates(gemma):
    assert Brief.on(gemma, 3).candidates(gemma) == [0, 1, 4]
    with pytest.raises(InputError, match=r"between 1 and 3: 6 blocks, 3 protected or tied to others, .* got 4"):
        Brief.on(gemma, 4)
    with pytest.raises(ArchitectureError, match="block 3 cannot be removed: blocks 5 use its keys and values"):
        Brief.on(gemma, 2, forced=(3,))


@pytest.mark.parametrize(
    ("budget", "protected", "forced", "message"),
    [
        (
            0,
            (),
            (),
            "between 1 and 5: 6 blocks, 0 protected or tied to others, 0 forced, and at least one stays; got 0",
        ),
        (
            6,
            (),
            (),
            "between 1 and 5: 6 blocks, 0 protected or tied to others, 0 forced, and at least one stays; got 6",
        ),
        (5, (0, 5), (), "between 1 and 4: 6 blocks, 2 protected or tied to others, 0 forced, .* got 5"),
        (1, (), (2, 3), "between 2 and 5: 6 blocks, 0 protected or tied to others, 2 forced, .* got 1"),
        (3, (2, 3), (3, 4), r"blocks \[3\] are both protected and forced"),
        (3, (6,), (), r"block indices must be between 0 and 5 .* got \[6\]"),
        (3, (), (2, -4), r"a block is named twice in \[-4, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(llama, budget, protected, forced, message):
    with pytest.raises(InputError, match=message):
        Brief.on(llama, budget, protected=protected, forced=forced)


FITTING = [(1, (), ()), (5, (), ()), (4, (0, 5), ()), (2, (), (2, 3))]


@pytest.mark.parametrize(("budget", "protected", "forced"), FITTING)
def test_the_ends_of_the_range_fit(llama, budget, protected, forced):
    assert Brief.on(llama, budget, protected=protected, forced=forced).budget == budget


def test_the_rest_knows_no_forced_blocks(llama):
    rest = Brief.on(llama, 4, protected=(3,), forced=(0, 5), seed=4).rest()
    assert rest == Brief(2, (0, 3, 5), (), 4)
    assert rest.candidates(llama) == [1, 2, 4]


@pytest.mark.parametrize(
    ("model", "protected", "forced", "allowed"),
    [
        ("llama", (0, 1), (), [(2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)]),
        ("llama", (0, 1), (4,), [(2, 4), (3, 4), (4, 5)]),
        ("gemma", (), (), [(0, 1), (0, 4), (1, 4)]),
        ("gemma", (), (4,), [(0, 4), (1, 4)]),
    ],
)
def test_the_problem_allows_what_the_brief_does(request, model, protected, forced, allowed):
    stack, generator = request.getfixturevalue(model), np.random.default_rng(0)
    J = generator.standard_normal((LAYERS, LAYERS))
    energy = Energy(generator.standard_normal(LAYERS), (J + J.T) / 2)
    problem = Brief.on(stack, 2, protected=protected, forced=forced).problem(stack, energy)
    assert [r for r in itertools.combinations(range(LAYERS), 2) if problem.allows(r)] == allowed
    assert [state.removed for state in solve(problem, states=10)] == sorted(allowed, key=energy.energy)
