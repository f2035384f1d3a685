"""A problem as QUBO or Ising model: the budget becomes a penalty P (Σx − M)², fixed units are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.artefacts import atomic_path, read_json, write_json
from excise.errors import InputError
from excise.ising.bridges.refused import require_no_pattern
from excise.ising.bridges.repair import marginals
from excise.ising.problem import Problem, Reduced

MARGIN = 1e-3


@dataclass(frozen=True, eq=False)
class Qubo:
    """E(x) = xᵀQx + offset for x in {0,1}^n, equal to the problem's energy wherever Σx = count.

    Args:
        Q: Symmetric, [n, n]; linear terms stand on the diagonal.
        offset: Constant, with the energy of the forced units.
        units: Original index of each variable, [n].
        forced: Original indices of units removed in every state; they are no variables.
        count: Σx of the states that meet the budget.
        penalty: P, in the unit of the energy.

    """

    Q: NDArray[np.float64]
    offset: float
    units: tuple[int, ...]
    forced: tuple[int, ...]
    count: int
    penalty: float

    def energy(self, x: ArrayLike) -> float:
        """Energy of one 0/1 vector, [n], penalty included."""
        values = np.asarray(x, dtype=np.float64)
        return float(values @ self.Q @ values) + self.offset

    def decode(self, x: ArrayLike) -> tuple[int, ...]:
        """Original indices removed, sorted, forced units included.

        Raises:
            InputError: x is not a 0/1 vector of n entries, or does not meet the budget.

        """
        return _decode(np.asarray(x), (0, 1), self.units, self.forced, self.count)

    def save(self, path: str | Path) -> None:
        """Write qbsolv's `.qubo` text: `p qubo 0 n diagonals couplers`, then `i i value` and `i j value` lines, i < j.

        A coupler's value multiplies x_i x_j once, so it is 2 Q_ij. Offset, units, forced units, count and penalty stand
        in comment lines, which `load` reads and other programs skip.
        """
        n = len(self.Q)
        i, j = np.nonzero(np.triu(self.Q, 1))
        lines = [
            "c E(x) = sum of value * x_i * x_j + offset; written by excise",
            f"c offset {self.offset!r}",
            f"c penalty {self.penalty!r}",
            f"c count {self.count}",
            " ".join(["c units", *map(str, self.units)]),
            " ".join(["c forced", *map(str, self.forced)]),
            f"p qubo 0 {n} {n} {len(i)}",
            *(f"{k} {k} {value!r}" for k, value in enumerate(np.diag(self.Q).tolist())),
            *(f"{a} {b} {v!r}" for a, b, v in zip(i.tolist(), j.tolist(), (2 * self.Q[i, j]).tolist(), strict=True)),
        ]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: str | Path) -> Qubo:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a `.qubo` file with excise's comment lines.

        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no file {path}")
        rows = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        notes = {row[1]: row[2:] for row in rows if len(row) > 1 and row[0] == "c"}
        try:
            n = len(notes["units"])
            Q = np.zeros((n, n))
            for i, j, value in (row for row in rows if row and row[0] not in ("c", "p")):
                Q[int(i), int(j)] += float(value) / 2
                Q[int(j), int(i)] += float(value) / 2
            return cls(
                Q,
                float(notes["offset"][0]),
                tuple(map(int, notes["units"])),
                tuple(map(int, notes["forced"])),
                int(notes["count"][0]),
                float(notes["penalty"][0]),
            )
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"{path} is not a .qubo file written by excise ({error!r}); write one with excise export --format qubo"
            ) from None


@dataclass(frozen=True, eq=False)
class Ising:
    """E(s) = hᵀs + sᵀJs + offset for spins s = 2x − 1 in {−1,1}^n; a spin of 1 is a removed unit.

    Args:
        h: Fields, [n].
        J: Couplings, strictly upper triangular, [n, n].
        offset: Constant.
        units: Original index of each spin, [n].
        forced: Original indices of units removed in every state; they are no spins.
        count: Number of spins that are 1 in the states that meet the budget; their magnetisation is 2·count − n.
        penalty: P of the QUBO it came from.

    """

    h: NDArray[np.float64]
    J: NDArray[np.float64]
    offset: float
    units: tuple[int, ...]
    forced: tuple[int, ...]
    count: int
    penalty: float

    def energy(self, spins: ArrayLike) -> float:
        """Energy of one configuration of spins, [n]."""
        s = np.asarray(spins, dtype=np.float64)
        return float(self.h @ s + s @ self.J @ s) + self.offset

    def decode(self, spins: ArrayLike) -> tuple[int, ...]:
        """Original indices removed, sorted, forced units included.

        Raises:
            InputError: not n spins of −1 or 1, or the budget is not met.

        """
        return _decode(np.asarray(spins), (-1, 1), self.units, self.forced, self.count)

    def save(self, path: str | Path) -> None:
        """Write JSON: `h` as a list, `J` as [i, j, value] triples with i < j, and the other fields by name."""
        i, j = np.nonzero(self.J)
        triples = [[a, b, v] for a, b, v in zip(i.tolist(), j.tolist(), self.J[i, j].tolist(), strict=True)]
        fields = {"offset": self.offset, "units": self.units, "forced": self.forced, "count": self.count}
        write_json(path, {"h": self.h, "J": triples, **fields, "penalty": self.penalty})

    @classmethod
    def load(cls, path: str | Path) -> Ising:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not an Ising model.

        """
        value = read_json(path)
        try:
            h = np.array(value["h"], dtype=np.float64)
            J = np.zeros((len(h), len(h)))
            for i, j, coupling in value["J"]:
                J[i, j] = coupling
            lists = {name: tuple(value[name]) for name in ("units", "forced")}
            return cls(h, J, value["offset"], **lists, count=value["count"], penalty=value["penalty"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{path} is not an Ising model ({error!r}); expected what excise export writes") from None


def to_qubo(problem: Problem, penalty: float | None = None) -> Qubo:
    """Write a problem as a QUBO over its free units.

    Args:
        problem: With a budget and without further constraints.
        penalty: P, in the unit of the energy; None for `safe_penalty`.

    Raises:
        InputError: the problem has further constraints or no budget, or the penalty is not a positive number.

    >>> import numpy as np
    >>> from excise.ising.energies import Energy
    >>> qubo = to_qubo(Problem(Energy(None, np.diag([3.0, 1.0, 2.0, 9.0])), budget=2, protected=(3,)))
    >>> qubo.units, qubo.decode([0, 1, 1]), round(qubo.energy([0, 1, 1]), 9)
    ((0, 1, 2), (1, 2), 3.0)

    """
    reduced = penalisable(problem)
    P = safe_penalty(problem) if penalty is None else float(penalty)
    if not (np.isfinite(P) and P > 0):
        raise InputError(f"the penalty must be a positive number, got {penalty}")
    Q = reduced.J + P
    Q[np.diag_indices_from(Q)] += reduced.h - 2 * P * reduced.count
    return Qubo(
        Q,
        reduced.constant + P * reduced.count**2,
        tuple(reduced.units.tolist()),
        reduced.forced,
        reduced.count,
        P,
    )


def to_ising(problem: Problem, penalty: float | None = None) -> Ising:
    """Write a problem as an Ising model over the spins of its free units; arguments and errors as for `to_qubo`.

    >>> import numpy as np
    >>> from excise.ising.energies import Energy
    >>> ising = to_ising(Problem(Energy(None, np.diag([3.0, 1.0, 2.0])), budget=2), penalty=4.0)
    >>> ising.decode([-1, 1, 1]), ising.energy([-1, 1, 1])
    ((1, 2), 3.0)

    """
    qubo = to_qubo(problem, penalty)
    couplings = np.triu(qubo.Q, 1) / 2
    diagonal = np.diag(qubo.Q)
    h = qubo.Q.sum(axis=1) / 2
    offset = qubo.offset + float(diagonal.sum() / 2 + couplings.sum())
    return Ising(h, couplings, offset, qubo.units, qubo.forced, qubo.count, qubo.penalty)


def safe_penalty(problem: Problem) -> float:
    """A penalty with which every minimum of the QUBO provably removes exactly M units.

    Let e_k be the lowest energy with Σx = k, m the free units' budget. The minimum is feasible when
    P (k − m)² > e_m − e_k for every k ≠ m. The difference is bounded from above in two ways, and the smaller is used:

    - by U − L_k, with U the energy of one feasible state (tabu search) and L_k ≤ e_k the larger of two bounds:
      the k smallest of h_i + J_ii + (sum of the k − 1 smallest J_ij, j ≠ i), and k λ_min(J) + (k smallest h_i);
    - by walking from size k to m, one unit at a time: among n − s kept units the cheapest to remove costs at most the
      (s + 1)-th smallest of h_i + J_ii + 2 (sum of the s largest J_ij, j ≠ i), and likewise for putting one back.

    For a positive semidefinite J with h = 0, L_k is 0 and P little more than E₀: far below Σ|J_ij|. Only the minimum is
    proved feasible; excited states of the QUBO may remove another number of units.

    Raises:
        InputError: the problem has further constraints or no budget.

    """
    reduced = penalisable(problem)
    n, m = len(reduced.h), reduced.count
    scale = float(max(np.abs(reduced.h).max(initial=0.0), np.abs(reduced.J).max(initial=0.0)))
    margin = MARGIN * 1e-3 * (scale or 1.0)
    if n == 0:
        return margin
    good = _good_state(problem)
    upper = float(reduced.h @ good + good @ reduced.J @ good)
    sizes = np.array([k for k in range(n + 1) if k != m])
    by_bounds = upper - _lowest_of_each_size(reduced)[sizes]
    gain = np.minimum(by_bounds, _walk_to(m, reduced)[sizes])
    return (1 + MARGIN) * max(0.0, float((gain / (sizes - m) ** 2).max(initial=0.0))) + margin


def soft_penalty(problem: Problem) -> float:
    """A smaller penalty for annealers whose samples are repaired; the minimum need not be feasible.

    An annealer that flips one unit at a time passes through states that miss the budget by one, at a cost of P. So P is
    set to what a swap costs: the median, over the units that a good state (tabu search) removes, of the energy added by
    their cheapest swap with a kept unit. Never above `safe_penalty`. A heuristic, compared in docs/bridges.md.

    Raises:
        InputError: the problem has further constraints or no budget.

    """
    reduced = penalisable(problem)
    safe = safe_penalty(problem)
    good = _good_state(problem)
    inside, outside = np.flatnonzero(good == 1), np.flatnonzero(good == 0)
    if len(inside) == 0 or len(outside) == 0:
        return safe
    c = marginals(reduced, good)
    swaps = c[outside][None, :] - c[inside][:, None] - 2 * reduced.J[np.ix_(inside, outside)]
    return min(safe, max(float(np.median(swaps.min(axis=1))), MARGIN * safe))


def penalisable(problem: Problem) -> Reduced:
    """The problem without its fixed units, where a penalty on Σx alone can express it.

    Raises:
        InputError: the problem has further constraints or no budget.

    """
    require_no_pattern(problem)
    if problem.constraints:
        names = ", ".join(constraint.name for constraint in problem.constraints)
        raise InputError(
            f"a QUBO holds the budget only, this problem also asks for: {names}. Use --format lp, or a solver that "
            "takes constraints (branch-and-bound, gurobi, scip, highs)"
        )
    if problem.budget is None:
        raise InputError("a QUBO needs a budget, this problem has none: give the number of units to remove")
    return problem.reduced()


def _good_state(problem: Problem) -> NDArray[np.int8]:
    from excise.ising.solvers.tabu import Tabu

    removed = Tabu(restarts=20).solve(problem, states=1)[0].removed
    return np.isin(problem.free, removed).astype(np.int8)


def _sums_of_smallest(J: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entry [i, k]: sum of the k smallest J_ij with j ≠ i, [n, n]."""
    n = len(J)
    others = J[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    return np.hstack([np.zeros((n, 1)), np.cumsum(np.sort(others, axis=1), axis=1)])


def _lowest_of_each_size(reduced: Reduced) -> NDArray[np.float64]:
    """A lower bound on the energy of every state with Σx = k, for k = 0 … n, less what rounding may hide."""
    h, J, n = reduced.h, reduced.J, len(reduced.h)
    smallest = _sums_of_smallest(J)
    own = h + np.diag(J)
    by_rows = np.array([0.0, *(np.sort(own + smallest[:, k - 1])[:k].sum() for k in range(1, n + 1))])
    eigenvalue = np.linalg.eigvalsh(J)[0]
    by_spectrum = np.array([k * eigenvalue + np.sort(h)[:k].sum() for k in range(n + 1)])
    # A bound must hold in exact arithmetic, so what rounding may have added is taken off.
    rounding = 1e-14 * n * float(np.abs(h).sum() + np.abs(J).sum())
    return np.maximum(by_rows, by_spectrum) - rounding


def _walk_to(m: int, reduced: Reduced) -> NDArray[np.float64]:
    """An upper bound on e_m − e_k for k = 0 … n, by adding or putting back one unit at a time."""
    J, n = reduced.J, len(reduced.h)
    smallest, largest = _sums_of_smallest(J), -_sums_of_smallest(-J)
    own = reduced.h + np.diag(J)
    add = [np.sort(own + 2 * largest[:, s])[s] for s in range(n)]
    drop = [-np.sort(own + 2 * smallest[:, s - 1])[s - 1] for s in range(1, n + 1)]
    walk = np.zeros(n + 1)
    for lower, upper in reversed(list(pairwise(range(m + 1)))):
        walk[lower] = walk[upper] + add[lower]
    for lower, upper in pairwise(range(m, n + 1)):
        walk[upper] = walk[lower] + drop[lower]
    return walk


def _decode(
    values: NDArray[np.generic], levels: tuple[int, int], units: tuple[int, ...], forced: tuple[int, ...], count: int
) -> tuple[int, ...]:
    low, high = levels
    if values.shape != (len(units),) or not np.isin(values, levels).all():
        raise InputError(f"expected {len(units)} values of {low} or {high}, got {values.tolist()}")
    chosen = np.flatnonzero(values == high)
    if len(chosen) != count:
        raise InputError(
            f"this sample removes {len(chosen)} of the free units, the budget asks for {count}; repair it "
            "(excise.ising.bridges.repair.to_count) or raise the penalty"
        )
    return tuple(sorted((*forced, *(units[i] for i in chosen))))
