"""The problem of removing blocks of a given model: an energy, and what the model itself forbids."""

from __future__ import annotations

from collections.abc import Sequence

from excise.ising.energies import Energy
from excise.ising.pattern import Pattern
from excise.ising.problem import Constraint, Problem, at_most
from excise.models.stack import Stack


def block_problem(
    stack: Stack,
    energy: Energy,
    budget: int | None,
    protected: Sequence[int] = (),
    forced: Sequence[int] = (),
    pattern: Pattern | None = None,
) -> Problem:
    """The problem of removing `budget` blocks, in which blocks that others depend on stay.

    Args:
        stack: the model; its `fixed` blocks are protected, and one of its `needed` blocks stays.
        energy: over blocks.
        budget: number M of blocks to remove; None for any number that leaves one.
        protected: blocks that stay too.
        forced: blocks that go; they count towards the budget.
        pattern: what must be kept for other readers, see `excise.models.portable.pattern_of`.

    Raises:
        InputError: the budget cannot be met.

    """
    stays = tuple(sorted({*protected, *stack.fixed}))
    constraints: list[Constraint] = []
    # A condition and not a protected block: which of them stays is the solver's to choose.
    if stack.needed:
        name = "one block with a cache must stay"
        constraints.append(at_most(stack.needed, len(stack.needed) - 1, len(stack.blocks), name=name))
    if budget is None:
        n = len(stack.blocks)
        constraints.append(at_most(range(n), n - 1, n, name="one block must stay"))
    return Problem(
        energy, budget, protected=stays, forced=tuple(forced), constraints=tuple(constraints), pattern=pattern
    )
