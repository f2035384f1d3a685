"""Path relinking: where its states lie, and that it finds what random starts miss."""

from __future__ import annotations

import numpy as np
import pytest

from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most
from excise.ising.solvers import tabu
from excise.ising.solvers.relinking import ELITE, Elite, relinked
from excise.ising.solvers.tabu import Tabu

from .problems import matrix


def reduced(n=20, budget=8, seed=0, constraints=()):
    energy = Energy(None, matrix("indefinite", n, np.random.default_rng(seed)))
    return Problem(energy, budget, constraints=constraints).reduced(budget)


def energy_of(problem, state):
    return problem.h[list(state)].sum() + problem.J[np.ix_(state, state)].sum()


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_lowest_on_the_middle_of_the_greedy_path(seed):
    problem = reduced(seed=seed)
    start, end = tuple(range(8)), tuple(range(6, 14))
    found = relinked(problem, start, end)
    state, passed = set(start), []
    while missing := set(end) - state:
        swapped = [tuple(sorted(state - {out} | {into})) for out in state - set(end) for into in missing]
        state = set(min(swapped, key=lambda s: energy_of(problem, s)))
        passed.append(tuple(sorted(state)))
    # Six swaps apart: the first and the last are near the ends.
    assert found == min(passed[:5], key=lambda s: energy_of(problem, s))
    assert len({*found} - {*start}) >= 1


def test_neighbours_have_nothing_between_them():
    assert relinked(reduced(), (0, 1, 2), (0, 1, 3)) is None
    assert relinked(reduced(), (0, 1, 2), (0, 1, 2)) is None


def test_the_elite_are_the_lowest_that_satisfy_constraints_each_once():
    problem = reduced(constraints=(at_most(range(10), 3, 20),))
    elite, random = Elite(problem), np.random.default_rng(1)
    for _ in range(60):
        elite.add(random.permutation(20)[:8])
    elite.add(np.array(elite.states[0][1]))
    states = [state for _, state in elite.states]
    assert len(set(states)) == len(states) == ELITE
    assert all(sum(unit < 10 for unit in state) <= 3 for state in states)
    assert elite.states == sorted(elite.states)
    pairs = list(elite.starts())
    assert len(pairs) <= ELITE * (ELITE - 1)
    assert not list(elite.starts())  # every pair was tried


def test_it_finds_lower_states_than_the_random_starts_before_it(monkeypatch):
    J = np.random.default_rng(2).standard_normal((200, 200))
    problem = Problem(Energy(None, J + J.T), 100)
    relinking = Tabu(restarts=3, patience=0).solve(problem, 5)
    monkeypatch.setattr(tabu, "FEWEST_RELINKED", 1000)
    alone = Tabu(restarts=3, patience=0).solve(problem, 5)
    assert relinking[0].energy < alone[0].energy
    assert relinking.evaluated > alone.evaluated
