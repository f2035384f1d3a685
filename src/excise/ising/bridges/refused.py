"""What programs of others are not asked to solve."""

from __future__ import annotations

from excise.errors import InputError
from excise.ising.problem import Problem


def require_no_pattern(problem: Problem) -> None:
    """Refuse a problem in which what stays must keep a pattern: that is no linear condition on what is removed.

    Raises:
        InputError: it has a pattern.

    """
    if problem.pattern is not None:
        raise InputError(
            f"this problem asks for {problem.pattern.name}, which other programs' formats do not hold; use a solver of "
            "excise (branch-and-bound, exhaustive, tabu, annealing)"
        )
