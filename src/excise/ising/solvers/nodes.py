"""A node of the tree as a problem of its own: a shift for it alone, and its semidefinite bound with triangles.

The shifts that the tree search keeps serve all nodes of a depth. Far from the end that is weak: a shift for the one
node halves its gap, at the price of a few hundred nodes of the search, and triangle inequalities close most of the
rest, at the price of a few thousand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.bound import best_shift, make_valid
from excise.ising.solvers.semidefinite import Relaxation, Solution
from excise.ising.solvers.tree import Instance
from excise.ising.solvers.triangles import Triangles, no_triangles, violated

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

import os
ROUNDS = int(os.environ.get('ROUNDS','3'))
LEAST_VIOLATION = 0.02  # of a triangle inequality, whose right side is 1
NEW_TRIANGLES = int(os.environ.get('NEWT','3'))  # in each round, for every unit
LEAST_GAIN = 0.1  # of the gap left, for another round
TOLERANCE = 0.01  # of the gap that a shift leaves
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

    def with_own_shift(self, instance: Instance, tolerance: float) -> tuple[Instance, float]:
        """The instance with one shift, the best for this node's units, and the bound of the node that it gives."""
        shift = best_shift(self.J, self.h, self.count, tolerance, self.C, self.bounds)
        n = len(instance.h)
        shifts = np.zeros((1, n))
        shifts[0, self.free] = shift.u
        own = instance._replace(
            shifts=shifts,
            which=np.zeros(n + 1, dtype=np.int64),
            tilt=-instance.C.T @ shift.multipliers,
            offset=np.array([shift.multipliers @ instance.bounds]),
        )
        return own, shift.value + self.constant

    def tighten(self, known: Triangles, limit: float, enough: float, tol: float) -> Tightened:
        """Bound the node by the semidefinite relaxation, with triangles separated in rounds.

        Args:
            known: Triangles over all units to begin with, as from the node above.
            limit: A bound above this need not be any better.
            gap: What the limit exceeds the bound without triangles by.

        """
        n, tolerance, target = len(self.free), tol, limit - self.constant
        heaviest = np.maximum(np.abs(self.C).max(axis=1, initial=0.0), 1e-300)
        relaxation = Relaxation(self.J, self.h, self.count, self.C / heaviest[:, None], self.bounds / heaviest)
        target += 1e-9 * abs(target)
        solution = relaxation.solve(relaxation.start(), no_triangles(), tolerance, target, NEAR * tolerance)
        new = known if solution.value <= target - enough else no_triangles()
        for _ in range(ROUNDS + 1):
            if len(new):
                start, cuts = relaxation.extended(solution, new)
                better = relaxation.solve(start, cuts, tolerance, target, NEAR * tolerance)
                gain = better.value - solution.value
                solution = better if gain > 0 else solution
                if gain < LEAST_GAIN * (target - solution.value) and new is not known:
                    break
            if solution.value > target - enough:
                break
            Y = relaxation.unproject(solution.point.Z)
            new = violated(Y, LEAST_VIOLATION, NEW_TRIANGLES * n)
            if len(new) == 0:
                break
        bound, verdict, below = self._fixed(relaxation, solution, heaviest, limit)
        bound = max(bound, relaxation.proved(solution) + self.constant)
        return Tightened(bound, verdict, solution.cuts.take(solution.active()).named(self.free), below)

    def _fixed(
        self, relaxation: Relaxation, solution: Solution, heaviest: Vector, limit: float
    ) -> tuple[float, NDArray[np.int8], tuple]:
        """Bound at the relaxation's point, and the values that its reduced costs leave to each unit, −1 for both."""
        Q, linear, offset = self._convex(relaxation, solution, heaviest)
        Y = relaxation.unproject(solution.point.Z)
        y = np.clip((1 + Y[0, 1:] / np.sqrt(Y[0, 0])) / 2, 0.0, 1.0)
        G = 2 * Q @ y + linear
        ordered = np.sort(G)
        bound = float(offset + y @ (Q @ y) + linear @ y - G @ y + ordered[: self.count].sum())
        inner, outer = ordered[self.count - 1], ordered[self.count]
        verdict = np.full(len(y), -1, dtype=np.int8)
        verdict[(inner >= G) & (bound + outer - G > limit)] = 1
        verdict[(outer <= G) & (bound + G - inner > limit)] = 0
        return bound, verdict, (Q, linear, offset)

    def _convex(self, relaxation: Relaxation, solution: Solution, heaviest: Vector) -> tuple[Matrix, Vector, float]:
        """The dual solution as a function xᵀQx + linear·x + offset that is convex and at or below E at every state."""
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
        return Q, linear, offset + self.constant


@dataclass(frozen=True)
class Tightened:
    """A node's bound with triangles, which holds rounding included.

    Attributes:
        bound: of the energy of every state below the node.
        verdict: for each free unit, the only value that states within the limit may give it; −1 for both.
        cuts: triangles that the nodes below can begin with, over all units.

    """

    bound: float
    verdict: NDArray[np.int8]
    cuts: Triangles
    below: tuple

    def instance(self, instance, free):
        n = len(instance.h)
        Q, linear, offset = self.below
        convex = np.zeros((n, n)); convex[np.ix_(free, free)] = Q
        lin = np.zeros(n); lin[free] = linear
        return instance._replace(convex=convex, linear=lin, tilt=np.zeros(n), offset=np.array([offset]), shifts=np.zeros((1, n)), which=np.zeros(n + 1, dtype=np.int64))
