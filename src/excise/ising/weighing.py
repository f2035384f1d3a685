"""Budgets in what units weigh: parameters, bytes, or the time that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from excise.errors import InputError
from excise.ising.problem import Constraint, weigh_at_least, weigh_at_most
from excise.settings import MILLISECONDS, Goal, amount_of


@dataclass(frozen=True)
class Weights:
    """What units weigh in one measure.

    Attributes:
        units: [N], of each unit.
        whole: what a share is a share of: all units together, or more where something else weighs too.

    """

    units: tuple[float, ...]
    whole: float

    @staticmethod
    def of(units: Sequence[float]) -> Weights:
        """Weights of units beside which nothing is counted."""
        return Weights(tuple(units), sum(units))


def weight_budget(weights: Weights, goal: Goal, protected: Sequence[int] = ()) -> tuple[Constraint, ...]:
    """At least the amount asked for, at most the heaviest unit beyond it: an energy may fall as more is removed.

    Args:
        weights: of the units, in the goal's measure.
        goal: the amount.
        protected: units that stay; negative indices count from the end.

    Raises:
        InputError: the amount is no such number, or all units that may go weigh less.

    """
    target = amount_of(goal.amount, weights.whole, goal.asked)
    stays = {i % len(weights.units) for i in protected}
    most = sum(weight for i, weight in enumerate(weights.units) if i not in stays)
    if not 0 < target <= most * (1 + 1e-12):
        raise InputError(_out_of_reach(weights, goal, target, most))
    asked = f"{goal.asked}, {target:,.6g} of {weights.whole:,.6g} {goal.measure}"
    return (
        weigh_at_least(weights.units, target, name=f"at least what is asked for ({asked})"),
        weigh_at_most(weights.units, target + max(weights.units), name="at most one unit more than that"),
    )


def _out_of_reach(weights: Weights, goal: Goal, target: float, most: float) -> str:
    share = most / weights.whole
    faster = f" and makes it {1 / (1 - share):.2f} times as fast" if goal.measure == MILLISECONDS and share < 1 else ""
    return (
        f"{goal.asked} stands for {target:,.6g} of {weights.whole:,.6g} {goal.measure}: expected more than 0, and no "
        f"more than all that may go together have, {most:,.6g}, which is {share:.1%}{faster}. Ask for less, or protect "
        f"fewer"
    )
