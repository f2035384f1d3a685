"""A node of the tree as a problem of its own: its semidefinite bound, with triangles where that leaves too much.

The shifts that the tree search keeps serve all nodes of a depth. Far from the end that is weak: the relaxation of the
one node halves its gap, at the price of a few hundred nodes of the search, and triangle inequalities close most of the
rest, at the price of a few thousand. Either way the dual solution is a convex quadratic function that no state's energy
falls below, under which the search goes on in the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.bound import make_valid
from excise.ising.solvers.semidefinite import Relaxation, Solution
from excise.ising.solvers.tree import Instance
from excise.ising.solvers.triangles import Triangles, no_triangles, violated

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

ROUNDS = 3
LEAST_VIOLATION = 0.02  # of a triangle inequality, whose right side is 1
NEW_TRIANGLES = 3  # in each round, for every unit
LEAST_GAIN = 0.1  # of the gap left, for another round
NEAR = 100  # tolerances; see Relaxation.solve


@dataclass(frozen=True)
class Node:
    """What is left to decide at a node: min constant + hᵀx + xᵀJx over Σx = count and Cx ≥ bounds, for n free units."""

    free: NDArray[np.int64]
    J: Matrix
    h: Vector
    count: int
    constant: float
    C: Matrix
    bounds: Vector

    @classmethod
    def of(cls, instance: Instance, status: NDArray[np.int8], count: int) -> Node:
        """The node with this status, of a problem that removes `count` units."""
        free, removed = np.flatnonzero(status < 0), np.flatnonzero(status == 1)
        J, C = instance.J, instance.C
        return cls(
            free,
            np.ascontiguousarray(J[np.ix_(free, free)]),
            instance.h[free] + 2 * J[np.ix_(free, removed)].sum(axis=1),
            count - len(removed),
            float(instance.h[removed].sum() + J[np.ix_(removed, removed)].sum()),
            np.ascontiguousarray(C[:, free]),
            instance.bounds - C[:, removed].sum(axis=1),
        )

    def tighten(self, known: Triangles, limit: float, enough: float, tolerance: float) -> Tightened:
        """Bound the node by the semidefinite relaxation, with triangles separated in rounds.

        Args:
            known: Triangles over all units to begin with, as from the node above.
            limit: A bound above this need not be any better.
            enough: Nor one that is no further than this below the limit.
            tolerance: Absolute, in the unit of the energy.

        """
        n, target = len(self.free), limit - self.constant
        heaviest = np.maximum(np.abs(self.C).max(axis=1, initial=0.0), 1e-300)
        relaxation = Relaxation(self.J, self.h, self.count, self.C / heaviest[:, None], self.bounds / heaviest)
        target += 1e-9 * abs(target)
        solution = relaxation.solve(relaxation.start(), no_triangles(), tolerance, target, NEAR * tolerance)
        new = known
        for _ in range(ROUNDS + 1):
            if solution.value > target - enough:
                break
            if len(new):
                start, cuts = relaxation.extended(solution, new)
                better = relaxation.solve(start, cuts, tolerance, target, NEAR * tolerance)
                gain = better.value - solution.value
                solution = better if gain > 0 else solution
                if gain < LEAST_GAIN * (target - solution.value) and new is not known:
                    break
            Y = relaxation.unproject(solution.point.Z)
            new = violated(Y, LEAST_VIOLATION, NEW_TRIANGLES * n)
            if len(new) == 0:
                break
        minorant = self._minorant(relaxation, solution, heaviest)
        Y = relaxation.unproject(solution.point.Z)
        y = np.clip((1 + Y[0, 1:] / np.sqrt(Y[0, 0])) / 2, 0.0, 1.0)
        bound, verdict = minorant.fixed(y, self.count, limit)
        bound = max(bound, relaxation.proved(solution) + self.constant)
        return Tightened(bound, verdict, solution.cuts.take(solution.active()).named(self.free), minorant)

    def under(self, minorant: Minorant, instance: Instance) -> Instance:
        """The instance with the node's own function as the bound, for the search below this node only."""
        n = len(instance.h)
        convex, linear = np.zeros((n, n)), np.zeros(n)
        convex[np.ix_(self.free, self.free)] = minorant.Q
        linear[self.free] = minorant.linear
        return instance._replace(
            convex=convex,
            linear=linear,
            tilt=np.zeros(n),
            offset=np.array([minorant.offset]),
            shifts=np.zeros((1, n)),
            which=np.zeros(n + 1, dtype=np.int64),
        )

    def _minorant(self, relaxation: Relaxation, solution: Solution, heaviest: Vector) -> Minorant:
        """The dual solution as a function of x."""
        u, z = solution.point.u * relaxation.scale, solution.point.z * relaxation.scale
        m = len(solution.cuts)
        multipliers = z[m:] / heaviest
        # From spins: s_i s_j = 4 x_i x_j − 2 x_i − 2 x_j + 1, and x = 1 for the constant.
        A = relaxation.combined(np.zeros(len(u)), np.concatenate([z[:m], np.zeros(len(multipliers))]), solution.cuts)
        inner, outer = A[1:, 1:], A[0, 1:]
        Q = self.J - 4 * inner
        np.fill_diagonal(Q, 0.0)
        shift = make_valid(Q, 4 * u[1:])
        Q -= np.diag(shift)
        linear = self.h + np.diag(self.J) + 4 * inner.sum(axis=1) - 4 * outer + shift - self.C.T @ multipliers
        offset = float(-z[:m].sum() - inner.sum() + 2 * outer.sum() + multipliers @ self.bounds)
        offset -= 1e-14 * float(np.abs(Q).sum() + np.abs(linear).sum() + z[:m].sum())
        return Minorant(Q, linear, offset + self.constant)


def compile_kernels() -> None:
    """Bound a small node, so that the kernels are compiled."""
    n, none = 8, np.zeros(0)
    node = Node(np.arange(n), np.eye(n) + 0.1, np.zeros(n), n // 2, 0.0, np.zeros((0, n)), none)
    node.tighten(no_triangles(), np.inf, 0.0, 1e-3)


class Minorant(NamedTuple):
    """xᵀQx + linear·x + offset over a node's free units: convex along Σx = const, at or below E at every state.

    It is E less what each triangle's multiplier takes off where the triangle is slack, with the diagonal shifted.
    """

    Q: Matrix
    linear: Vector
    offset: float

    def fixed(self, y: Vector, count: int, limit: float) -> tuple[float, NDArray[np.int8]]:
        """The bound that a point y gives, and the only value that its reduced costs leave to each unit, −1 for both."""
        G = 2 * self.Q @ y + self.linear
        ordered = np.sort(G)
        bound = float(self.offset + y @ (self.Q @ y) + self.linear @ y - G @ y + ordered[:count].sum())
        inner, outer = ordered[count - 1], ordered[count]
        verdict = np.full(len(y), -1, dtype=np.int8)
        verdict[(inner >= G) & (bound + outer - G > limit)] = 1
        verdict[(outer <= G) & (bound + G - inner > limit)] = 0
        return bound, verdict


@dataclass(frozen=True)
class Tightened:
    """A node's bound by the relaxation, which holds rounding included.

    Attributes:
        bound: of the energy of every state below the node.
        verdict: for each free unit, the only value that states within the limit may give it; −1 for both.
        cuts: triangles that the nodes below can begin with, over all units.
        minorant: the function that the bound is the minimum of.

    """

    bound: float
    verdict: NDArray[np.int8]
    cuts: Triangles
    minorant: Minorant
