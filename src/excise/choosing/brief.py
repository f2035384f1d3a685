"""What is asked of whoever chooses: how many blocks go, which may not and which must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.pattern import Pattern
from excise.ising.problem import Problem, Removal
from excise.models.removable import block_problem
from excise.models.stack import Stack, block_indices, removable_indices


@dataclass(frozen=True)
class Brief:
    """A budget and its conditions.

    Attributes:
        budget: number M of blocks to remove.
        protected: blocks that stay.
        forced: blocks that go; they count towards the budget.
        seed: of everything random.
        pattern: what the blocks that stay must keep for other readers, see `excise.models.portable.pattern_of`.
        repaired: what is removed will be repaired; who measures the damage that is to be low measures it after repair.

    """

    budget: int
    protected: Removal = ()
    forced: Removal = ()
    seed: int = 0
    pattern: Pattern | None = None
    repaired: bool = False

    @staticmethod
    def on(
        stack: Stack,
        budget: int,
        *,
        protected: Sequence[int] = (),
        forced: Sequence[int] = (),
        seed: int = 0,
        pattern: Pattern | None = None,
    ) -> Brief:
        """A brief that fits a model.

        Args:
            stack: the model.
            budget: number M of blocks to remove.
            protected: blocks that stay; negative indices count from the top.
            forced: blocks that go; likewise.
            seed: of everything random.
            pattern: what the blocks that stay must keep.

        Raises:
            InputError: the budget does not fit the blocks that may go, or a block is both protected and forced.
            ArchitectureError: a forced block is one that others depend on.

        """
        brief = Brief(budget, block_indices(stack, protected), removable_indices(stack, forced), seed, pattern)
        # Checked here, so that a bad budget is refused before any pass begins.
        brief.candidates(stack)
        return brief

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
        return block_problem(stack, energy, self.budget, self.protected, self.forced, self.pattern)

    def allows(self, removed: Removal) -> bool:
        """Whether what stays keeps the pattern; criteria that know none are asked afterwards."""
        return self.pattern is None or self.pattern.holds(removed)
