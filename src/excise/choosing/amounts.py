"""Amounts to remove from a given model: what its blocks weigh in parameters, bytes or time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from excise.ising.problem import Constraint
from excise.ising.times import Times
from excise.ising.weighing import Weights, weight_budget
from excise.models.identity import model_identity
from excise.models.stack import Stack
from excise.settings import MILLISECONDS, Weighing


def given_times(stack: Stack, path: Path | None) -> Times | None:
    """Times of the model's blocks from a file; None where none is given.

    Raises:
        InputError: no such file, or times of another model.

    """
    return None if path is None else Times.load(path).of_model(model_identity(stack.model))


def amounts_of(
    stack: Stack, settings: Weighing, times: Times | None, protected: Sequence[int]
) -> tuple[Constraint, ...]:
    """What the blocks that go must weigh; nothing where a number is asked for, or while times are not known.

    Args:
        stack: the model.
        settings: what is asked for.
        times: of its blocks.
        protected: blocks that stay, besides those that the model fixes.

    Raises:
        InputError: all blocks that may go weigh less.

    """
    constraints: list[Constraint] = []
    for goal in settings.goals():
        if goal.measure != MILLISECONDS:
            weights = Weights.of([getattr(block, goal.measure) for block in stack.blocks])
        elif times is not None:
            weights = times.weights(settings.latency_of)
        else:
            continue
        constraints += weight_budget(weights, goal, (*protected, *stack.fixed))
    return tuple(constraints)
