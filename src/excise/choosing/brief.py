"""What is asked of whoever chooses: how many blocks go, which may not and which must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.pattern import Pattern
from excise.ising.problem import Constraint, Problem, Removal
from excise.models.removable import block_problem
from excise.models.stack import Stack, block_indices, removable_indices


@dataclass(frozen=True)
class Brief:
    """A budget and its conditions.

    Attributes:
        budget: number M of blocks to remove; where `amounts` are asked for instead, the most it may be.
        protected: blocks that stay.
        forced: blocks that go; they count towards the budget.
        seed: of everything random.
        pattern: what the blocks that stay must keep for other readers, see `excise.models.portable.pattern_of`.
        amounts: instead of a number of blocks, what they must weigh, see `excise.ising.weighing.weight_budget`.
        repaired: what is removed will be repaired; who measures the damage that is to be low measures it after repair.

    """

    budget: int
    protected: Removal = ()
    forced: Removal = ()
    seed: int = 0
    pattern: Pattern | None = None
    repaired: bool = False
    amounts: tuple[Constraint, ...] = ()

    @staticmethod
    def on(
        stack: Stack,
        budget: int | None,
        *,
        protected: Sequence[int] = (),
        forced: Sequence[int] = (),
        seed: int = 0,
        pattern: Pattern | None = None,
        amounts: tuple[Constraint, ...] = (),
    ) -> Brief:
        """A brief that fits a model.

        Args:
            stack: the model.
            budget: number M of blocks to remove; None leaves it to `amounts`.
            protected: blocks that stay; negative indices count from the top.
            forced: blocks that go; likewise.
            seed: of everything random.
            pattern: what the blocks that stay must keep.
            amounts: what the blocks that go must weigh.

        Raises:
            InputError: the budget or an amount does not fit the blocks that may go, or a block is both protected and
                forced.
            ArchitectureError: a forced block is one that others depend on.

        """
        stays, goes = block_indices(stack, protected), removable_indices(stack, forced)
        least = max(1, len(goes))
        brief = Brief(least if budget is None else budget, stays, goes, seed, pattern, amounts=amounts)
        # Checked here, so that a bad budget is refused before any pass begins.
        brief.candidates(stack)
        return replace(brief, budget=brief.counts(stack)[-1]) if amounts else brief

    def candidates(self, stack: Stack) -> list[int]:
        """Blocks that may go, the forced ones among them.

        Raises:
            InputError: the budget does not fit them, or a block is both protected and forced.

        """
        both = sorted(set(self.protected) & set(self.forced))
        if both:
            raise InputError(f"blocks {both} are both protected and forced; leave them out of one of the two")
        stays = {*self.protected, *stack.fixed}
        free = [block.index for block in stack.blocks if block.index not in stays]
        # An empty stack is no model.
        least, most = max(1, len(self.forced)), min(len(free), len(stack.blocks) - 1)
        if not least <= self.budget <= most:
            raise InputError(
                f"the budget (--remove) must be between {least} and {most}: {len(stack.blocks)} blocks, {len(stays)} "
                f"protected or tied to others, {len(self.forced)} forced, and at least one stays; got {self.budget}"
            )
        return free

    def counts(self, stack: Stack) -> list[int]:
        """Numbers of blocks that may go, ascending: the budget, or those that the amounts leave open."""
        return self.problem(stack, no_energy(len(stack.blocks))).counts()

    def rest(self) -> Brief:
        """What is left to choose when the forced blocks are gone, for those who know no forced blocks."""
        return replace(
            self,
            budget=self.budget - len(self.forced),
            protected=tuple(sorted((*self.protected, *self.forced))),
            forced=(),
        )

    def problem(self, stack: Stack, energy: Energy) -> Problem:
        """The problem of meeting this brief at the lowest energy."""
        fixed = (self.protected, self.forced, self.pattern)
        if not self.amounts:
            return block_problem(stack, energy, self.budget, *fixed)
        open_problem = block_problem(stack, energy, None, *fixed)
        return replace(open_problem, constraints=(*open_problem.constraints, *self.amounts))

    def allows(self, removed: Removal) -> bool:
        """Whether what stays keeps the pattern, and what goes weighs enough; criteria are asked afterwards."""
        weighs = all(constraint.holds(removed) for constraint in self.amounts)
        return weighs and (self.pattern is None or self.pattern.holds(removed))


def no_energy(units: int) -> Energy:
    """The energy that is 0 everywhere."""
    return Energy(None, np.zeros((units, units)))
