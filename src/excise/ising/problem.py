"""A problem: which units may be removed, how many, and under which constraints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from excise.errors import InputError
from excise.ising.energies.energy import Energy
from excise.ising.pattern import Pattern, completions, open_places

Removal = tuple[int, ...]
"""Sorted original indices of the units that go: of blocks, unless said otherwise."""


@dataclass(frozen=True)
class Constraint:
    """One linear condition on the removed units: the sum of `weights` over them is at least `at_least`.

    Args:
        weights: One number per unit of the energy, [N] (parameters, bytes, −1 for "at most").
        at_least: The bound.
        name: How errors name it.

    """

    weights: tuple[float, ...]
    at_least: float
    name: str = "constraint"

    @property
    def slack(self) -> float:
        """Rounding allowance of the sum; exact for integers below 2⁵³."""
        return 1e-12 * sum(abs(w) for w in self.weights)

    def holds(self, removed: Iterable[int]) -> bool:
        """Whether a configuration satisfies it."""
        return math.fsum(self.weights[i] for i in removed) >= self.at_least - self.slack


def weigh_at_least(weights: Sequence[float], target: float, name: str = "") -> Constraint:
    """Remove units that together weigh at least `target`, in the unit of `weights` (parameters, bytes).

    Raises:
        InputError: a weight or the target is not finite.

    """
    return Constraint(_finite(weights, target), float(target), name or f"weight removed ≥ {target:g}")


def weigh_at_most(weights: Sequence[float], limit: float, name: str = "") -> Constraint:
    """Remove units that together weigh at most `limit`, in the unit of `weights`.

    Beside `weigh_at_least`, target + the heaviest unit's weight keeps the result near the target: without it, removing
    nearly everything is allowed too, and a quadratic energy may well be lowest there.

    Raises:
        InputError: a weight or the limit is not finite.

    """
    values = _finite(weights, limit)
    return Constraint(tuple(-w for w in values), -float(limit), name or f"weight removed ≤ {limit:g}")


def _finite(weights: Sequence[float], bound: float) -> tuple[float, ...]:
    values = tuple(float(w) for w in weights)
    if not all(math.isfinite(w) for w in (*values, bound)):
        raise InputError("weights and their target must be finite numbers")
    return values


def at_most(units: Iterable[int], count: int, n: int, name: str = "") -> Constraint:
    """Remove at most `count` of `units`, for an energy of `n` units.

    Raises:
        InputError: a unit is out of range or the count is negative.

    """
    chosen = _indices(units, n, "at_most")
    if count < 0:
        raise InputError(f"at_most needs a count of 0 or more, got {count}")
    weights = tuple(-1.0 if i in chosen else 0.0 for i in range(n))
    return Constraint(weights, float(-count), name or f"at most {count} of {list(chosen)}")


@dataclass(frozen=True, eq=False)
class Reduced:
    """A problem without its fixed units: E(removed) = constant + hᵀx + xᵀJx over n free units, Σx = count, Cx ≥ bounds.

    `units[k]` is the original index of free unit k; `forced` are removed in every state.
    """

    h: Float64[np.ndarray, " n"]
    J: Float64[np.ndarray, "n n"]
    count: int
    constant: float
    units: Int64[np.ndarray, " n"]
    forced: tuple[int, ...]
    C: Float64[np.ndarray, "constraints n"]
    bounds: Float64[np.ndarray, " constraints"]  # slack already subtracted
    places: NDArray[np.bool_]  # [2, n, n + 1], see open_places; [2, 0, 1] without a pattern

    def removed(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """Original indices removed when the free units `chosen` are, sorted."""
        return tuple(sorted((*self.forced, *(int(self.units[i]) for i in chosen))))


@dataclass(frozen=True, eq=False)
class Problem:
    """Find the lowest energies over configurations that remove `budget` units.

    Args:
        energy: The energy over N units.
        budget: Number M of units to remove; None leaves it to the constraints, any number from 1 to all removable.
        protected: Units never removed. Negative indices count from the end.
        forced: Units always removed; they count towards the budget.
        constraints: Further linear conditions (`weigh_at_least`, `at_most`).
        pattern: Where units may stay, by how many below them do.

    Raises:
        InputError: an index is out of range, the budget cannot be met, or the constraints clash (named).

    >>> problem = Problem(Energy(None, np.eye(4)), budget=2, protected=(0, -1))
    >>> problem.protected, problem.number_of_states()
    ((0, 3), 1)

    """

    energy: Energy
    budget: int | None
    protected: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        n = len(self.energy)
        object.__setattr__(self, "protected", _indices(self.protected, n, "protected"))
        object.__setattr__(self, "forced", _indices(self.forced, n, "forced"))
        object.__setattr__(self, "constraints", tuple(self.constraints))
        self._check_fixed_units()
        self._check_budget()
        self._check_constraints()
        self._check_pattern()

    @property
    def free(self) -> tuple[int, ...]:
        """Units that are neither protected nor forced, ascending."""
        fixed = {*self.protected, *self.forced}
        return tuple(i for i in range(len(self.energy)) if i not in fixed)

    def counts(self) -> list[int]:
        """Numbers of removed units a state may have: the budget alone, or every number the constraints leave open."""
        if self.budget is not None:
            return [self.budget]
        lowest = max(1, len(self.forced))
        numbers = range(lowest, len(self.forced) + len(self.free) + 1)
        return [m for m in numbers if self._unreachable(m) is None and self._states(m)]

    def number_of_states(self) -> int:
        """How many states enumeration would visit; an upper bound where there are constraints."""
        return sum(self._states(m) for m in self.counts())

    def _states(self, count: int) -> int:
        """States that remove `count` units, constraints aside."""
        n, chosen = len(self.free), count - len(self.forced)
        if self.pattern is None:
            return math.comb(n, chosen)
        if n == 0:
            return int(self.pattern.holds(self.forced))
        return completions(open_places(self.pattern, self.free, self.forced), n - chosen)[0][0]

    def allows(self, removed: Iterable[int]) -> bool:
        """Whether a configuration satisfies budget, protected, forced and constraints."""
        units = set(removed)
        return (
            (len(units) >= 1 if self.budget is None else len(units) == self.budget)
            and units.isdisjoint(self.protected)
            and units.issuperset(self.forced)
            and all(constraint.holds(units) for constraint in self.constraints)
            and (self.pattern is None or self.pattern.holds(units))
        )

    def reduced(self, count: int | None = None) -> Reduced:
        """Drop the fixed units: forced ones move into the linear term and the constant, protected ones vanish.

        Args:
            count: Number of removed units, forced ones included; the budget by default.

        Raises:
            InputError: the problem has no budget and no count was given.

        """
        total = self.budget if count is None else count
        if total is None:
            raise InputError("this problem has no budget: give the number of removed units, one of problem.counts()")
        free, forced = np.array(self.free, dtype=np.int64), np.array(self.forced, dtype=np.int64)
        J = self.energy.J
        weights = np.array([c.weights for c in self.constraints], dtype=np.float64).reshape(-1, len(self.energy))
        bounds = np.array([c.at_least - c.slack for c in self.constraints], dtype=np.float64)
        return Reduced(
            h=self.energy.h[free] + 2 * J[np.ix_(free, forced)].sum(axis=1),
            J=np.ascontiguousarray(J[np.ix_(free, free)]),
            count=total - len(forced),
            constant=self.energy.energy(self.forced),
            units=free,
            forced=self.forced,
            C=np.ascontiguousarray(weights[:, free]),
            bounds=bounds - weights[:, forced].sum(axis=1),
            places=open_places(self.pattern, self.free, self.forced),
        )

    def _check_fixed_units(self) -> None:
        clash = sorted(set(self.protected) & set(self.forced))
        if clash:
            names = ", ".join(self.energy.labels[i] for i in clash)
            raise InputError(f"unit {names} is both protected and forced; keep it in one of the two lists")

    def _check_budget(self) -> None:
        removable = len(self.energy) - len(self.protected)
        if removable == 0:
            raise InputError(f"all {len(self.energy)} units are protected; nothing can be removed")
        if self.budget is None:
            return
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, np.integer)):
            raise InputError(f"budget must be a whole number of units, got {self.budget!r}")
        object.__setattr__(self, "budget", int(self.budget))
        if not 1 <= self.budget <= removable:
            raise InputError(
                f"budget must be between 1 and {removable} (removable units: {len(self.energy)} less "
                f"{len(self.protected)} protected), got {self.budget}"
            )
        if len(self.forced) > self.budget:
            raise InputError(
                f"{len(self.forced)} units are forced but the budget is {self.budget}; raise it or force fewer"
            )

    def _check_constraints(self) -> None:
        for constraint in self.constraints:
            if len(constraint.weights) != len(self.energy):
                expected, came = len(self.energy), len(constraint.weights)
                raise InputError(f"{constraint.name}: expected {expected} weights, one per unit; got {came}")
        if not self.constraints:
            return
        clashing = _minimal_clash(self)
        if clashing:
            fixed = f"{len(self.protected)} protected and {len(self.forced)} forced units"
            size = f"budget {self.budget}" if self.budget is not None else "any budget"
            raise InputError(
                f"no configuration satisfies {' and '.join(clashing)} with {size} and {fixed}; relax one of them"
            )

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        if len(self.pattern.allowed) != len(self.energy):
            expected, came = len(self.energy), len(self.pattern.allowed)
            raise InputError(f"{self.pattern.name}: expected places of {expected} units, got {came}")
        if not self.counts() or not all(map(self._states, self.counts())):
            fixed = f"{len(self.protected)} protected and {len(self.forced)} forced units"
            size = f"budget {self.budget}" if self.budget is not None else "any budget"
            raise InputError(
                f"nothing that remains keeps {self.pattern.name} with {size} and {fixed}; choose another budget, "
                f"protect and force fewer, or ask for fewer readers"
            )

    def _unreachable(self, count: int) -> str | None:
        """Name of a constraint that alone rules out `count` removed units."""
        for constraint in self.constraints:
            weights = np.sort(np.array(constraint.weights)[list(self.free)])[::-1]
            best = math.fsum([*weights[: count - len(self.forced)], *(constraint.weights[i] for i in self.forced)])
            if best < constraint.at_least - constraint.slack:
                return constraint.name
        return None


def _minimal_clash(problem: Problem) -> list[str]:
    """Names of a smallest-by-deletion set of constraints that no configuration satisfies; empty when feasible."""
    if _is_feasible(problem, problem.constraints):
        return []
    kept = list(problem.constraints)
    for constraint in problem.constraints:
        fewer = [c for c in kept if c is not constraint]
        if fewer and not _is_feasible(problem, tuple(fewer)):
            kept = fewer
    return [constraint.name for constraint in kept]


def _is_feasible(problem: Problem, constraints: tuple[Constraint, ...]) -> bool:
    from scipy.optimize import Bounds, LinearConstraint, milp

    n = len(problem.energy)
    low, high = np.zeros(n), np.ones(n)
    low[list(problem.forced)] = 1
    high[list(problem.protected)] = 0
    fewest, most = (problem.budget, problem.budget) if problem.budget is not None else (1, n)
    scales = [max(1e-300, max(abs(w) for w in c.weights)) for c in constraints]
    rows = np.array([np.ones(n), *(np.array(c.weights) / s for c, s in zip(constraints, scales, strict=True))])
    lower = np.array([fewest, *((c.at_least - c.slack) / s for c, s in zip(constraints, scales, strict=True))])
    upper = np.array([most, *(np.inf for _ in constraints)])
    result = milp(
        np.zeros(n), constraints=LinearConstraint(rows, lower, upper), bounds=Bounds(low, high), integrality=np.ones(n)
    )
    return result.status != 2


def _indices(units: Iterable[int], n: int, what: str) -> tuple[int, ...]:
    chosen = set()
    for unit in units:
        index = int(unit)
        if not -n <= index < n:
            raise InputError(f"{what} unit {index} is out of range: expected 0 to {n - 1}, or −1 to −{n} from the end")
        chosen.add(index % n)
    return tuple(sorted(chosen))
