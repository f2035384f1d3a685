"""Every budget of one energy in one call, sharing work between neighbouring budgets."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence

from excise.ising.problem import Problem
from excise.ising.solvers.base import Deadline
from excise.ising.solvers.bound import Shift
from excise.ising.solvers.branch_and_bound import BranchAndBound, Run
from excise.ising.solvers.exhaustive import Exhaustive
from excise.ising.spectrum import Spectrum

FEWER_RESTARTS = 30
SEEDED_STARTS = 20
ENUMERATED_STATES = 200_000


def prove_budgets(
    problems: Sequence[Problem], solver: BranchAndBound, states: int, seed: int, time_limit: float | None
) -> list[Spectrum]:
    """Solve problems that differ in their budget only, ascending.

    One chain of budgets per thread: the lowest states of a budget, each with its cheapest further units, start the
    tabu search of the next, and its shift starts the next one's. A time limit is for all of them together.
    """
    threads = min(solver.threads or os.cpu_count() or 1, len(problems))
    deadline = Deadline.after(time_limit)
    results: list[Spectrum | None] = [None] * len(problems)
    failures: list[BaseException] = []
    # Middle budgets are the hard ones: threads take them in turn, so that the chains are about equally long.
    chains = [range(k, len(problems), threads) for k in range(threads)]

    def follow(chain: range) -> None:
        try:
            _solve_chain(problems, chain, solver, states, seed, deadline, results)
        except BaseException as error:
            failures.append(error)
            deadline.cancel()

    helpers = [threading.Thread(target=follow, args=(chain,), daemon=True) for chain in chains]
    for helper in helpers:
        helper.start()
    try:
        for helper in helpers:
            while helper.is_alive():
                helper.join(0.02)
    except KeyboardInterrupt:
        deadline.cancel()
        for helper in helpers:
            helper.join()
    if failures:
        raise failures[0]
    return [result for result in results if result is not None]


def _solve_chain(
    problems: Sequence[Problem],
    chain: range,
    solver: BranchAndBound,
    states: int,
    seed: int,
    deadline: Deadline,
    results: list[Spectrum | None],
) -> None:
    before: Spectrum | None = None
    shift: Shift | None = None
    for place, k in enumerate(chain):
        problem = problems[k]
        share = Deadline(deadline.at)
        if deadline.limited:
            share = Deadline.after(deadline.left() / (len(chain) - place))
        if problem.number_of_states() <= ENUMERATED_STATES:
            results[k] = before = Exhaustive().solve(problem, states, seed=seed)
            continue
        run = Run(problem, states, share, threads=1, seed=seed)
        run.shift = shift
        starts = _grown(before, problem) if before is not None else []
        run.find_threshold(FEWER_RESTARTS if starts else solver.restarts, starts)
        run.prove()
        shift = run.shift
        results[k] = before = run.spectrum(solver.name)


def _grown(before: Spectrum, problem: Problem) -> Iterable[tuple[int, ...]]:
    """States of a smaller budget with the units added that raise the energy least, as places among the free units."""
    place = {unit: k for k, unit in enumerate(problem.free)}
    energy, budget = problem.energy, problem.budget or 0
    starts = []
    for state in before.states[:SEEDED_STARTS]:
        removed = set(state.removed)
        while len(removed) < budget:
            inside = sorted(removed)
            rise = energy.h + energy.J.diagonal() + 2 * energy.J[:, inside].sum(axis=1)
            removed.add(min((unit for unit in problem.free if unit not in removed), key=lambda unit: rise[unit]))
        starts.append(tuple(place[unit] for unit in sorted(removed) if unit in place))
    return starts
