"""The semidefinite relaxation in spins, with triangle inequalities: a primal-dual interior-point method.

With s = 2x − 1 and a constant spin s₀ = 1 the energy is ⟨C, ssᵀ⟩ + constant over p = n + 1 spins, and Σx = M says
that s is orthogonal to f = (n − 2M, 1, …, 1). The relaxation replaces ssᵀ by Y ⪰ 0 with Yf = 0 and a diagonal of ones;
its dual

    max  Σu − Σz + λ·limits   subject to   S = Vᵀ(C − diag u − Σ z_k A_k − Σ λ_c B_c)V ⪰ 0,  z, λ ≥ 0

has a multiplier z_k for each triangle inequality ⟨A_k, Y⟩ ≥ −1 and λ_c for each constraint; V spans {v : fᵀv = 0}.
Products of Σx = M with each x_i would add nothing: Yf = 0 says the same (Faye and Roupin, 4OR 5, 2007). The direction
is that of Helmberg, Rendl, Vanderbei and Wolkowicz (SIAM Journal on Optimization 6, 1996), with Mehrotra's corrector.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.bound import inverse_of
from excise.ising.solvers.interior import Form, Point, combined, dual, project, step, unproject
from excise.ising.solvers.triangles import Triangles, inner_products, no_triangles

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

MOST_STEPS = 40
ENOUGH = 0.02  # of the distance to a target that is out of reach
START = 1.0  # distance of the start from the edge of the cone, in standard deviations of C's eigenvalues
NEW_SLACK = 0.5  # that an inequality is given where it enters, of the 1 that independent spins have


class Solution(NamedTuple):
    """Where the method ended, and the last point before it came close to the edge, from which other cuts can start."""

    point: Point
    central: Point
    cuts: Triangles
    value: float

    def active(self) -> NDArray[np.bool_]:
        """Which of the triangles hold with equality, nearly."""
        m = len(self.cuts)
        return self.point.z[:m] > self.point.slack[:m]


class Relaxation:
    """The relaxation of min hᵀx + xᵀJx over Σx = count, Cx ≥ bounds, in units of `scale`."""

    def __init__(self, J: Matrix, h: Vector, count: float, C: Matrix, bounds: Vector) -> None:
        n = len(h)
        lifted = np.zeros((n + 1, n + 1))
        lifted[1:, 1:] = J / 4
        lifted[0, 1:] = lifted[1:, 0] = J.sum(axis=1) / 4 + h / 4
        self.constant = float(J.sum() / 4 + h.sum() / 2 + np.trace(lifted))
        np.fill_diagonal(lifted, 0.0)
        self.scale = float(np.linalg.norm(lifted)) / (n + 1) or 1.0
        self.C = lifted / self.scale
        face = np.ones(n + 1)
        face[0] = n - 2 * count
        self.mirror = face / np.linalg.norm(face)  # unit vector of the reflection that takes `face` to the first axis
        self.mirror[0] += 1.0 if self.mirror[0] >= 0 else -1.0
        self.mirror /= np.linalg.norm(self.mirror)
        self.rows = C / 4  # Σ C_i x_i ≥ b is ⟨B, Y⟩ ≥ limit, B having C_i/4 at (0, i) and (i, 0)
        self.limits = bounds - C.sum(axis=1) / 2

    def unproject(self, Z: Matrix) -> Matrix:
        """VZVᵀ, [p, p]."""
        return unproject(Z, self.mirror)

    def combined(self, u: Vector, z: Vector, cuts: Triangles) -> Matrix:
        """Sum of multipliers and what they multiply, diag u + Σ λ_c B_c + Σ z_k A_k, [p, p]."""
        return combined(self._form(cuts), u, z)

    def dual(self, u: Vector, z: Vector, cuts: Triangles) -> Matrix:
        """S, [n, n]."""
        return dual(self._form(cuts), u, z, 1.0)

    def right(self, cuts: Triangles) -> Vector:
        """What the products with the triangles and the constraints are at least."""
        return np.concatenate([np.full(len(cuts), -1.0), self.limits])

    def _form(self, cuts: Triangles) -> Form:
        return Form(self.C, self.mirror, self.rows, cuts.units, cuts.signs, self.right(cuts))

    def start(self) -> Point:
        """A point for no triangles, on the central path but for the diagonal of Y."""
        p, z = len(self.C), np.full(len(self.limits), 1e-3)
        eigenvalues = np.linalg.eigvalsh(project(self.C, self.mirror))
        below = float(eigenvalues[0] - START * eigenvalues.std()) - float(np.abs(self.rows).sum()) - 1e-2
        u = np.full(p, below)
        inverse = inverse_of(self.dual(u, z, no_triangles()))
        mu = p / float(np.trace(inverse))
        return Point(u, z, mu * inverse, np.ones(len(z)), mu)

    def solve(self, start: Point, cuts: Triangles, tolerance: float, target: float, near: float) -> Solution:
        """Follow the central path until primal and dual differ by `tolerance` or the dual exceeds `target`.

        Args:
            start: A point for these cuts.
            cuts: Triangle inequalities.
            tolerance: Absolute, in the unit of the energy.
            target: Likewise; infinite where there is none.
            near: Duality gap below which a point is too close to the edge to start others from, in the same unit.

        """
        form, projected = self._form(cuts), project(self.C, self.mirror)
        tolerance, target, near = tolerance / self.scale, (target - self.constant) / self.scale, near / self.scale
        point, central, value = start, start, -np.inf
        for _ in range(MOST_STEPS):
            moved, possible = step(form, point)
            # At the edge of the cones, or where no state meets the constraints, numbers overflow.
            if not (possible and np.isfinite(moved.mu) and np.isfinite(moved.u).all() and np.isfinite(moved.Z).all()):
                break
            point = moved
            if point.mu * (len(point.Z) + len(point.z)) > near:
                central = point
            value = float(point.u.sum() + point.z @ form.right)
            primal = float(np.vdot(projected, point.Z))
            hopeless = primal < target < np.inf and primal - value < ENOUGH * (target - value)
            if value > target or hopeless or abs(primal - value) < tolerance:
                break
        return Solution(point, central, cuts, value * self.scale + self.constant)

    def proved(self, solution: Solution) -> float:
        """The dual's value, less what rounding may have added to it; −∞ where S is not shown to be semidefinite.

        A Cholesky factorisation that runs through proves S ⪰ −δ with δ about p·ε·trace, and Y has trace p.
        """
        u, z, cuts = solution.point.u, solution.point.z, solution.cuts
        S, p = self.dual(u, z, cuts), len(u)
        try:
            np.linalg.cholesky(S)
        except np.linalg.LinAlgError:
            return -np.inf
        terms = float(np.abs(u).sum() + np.abs(z * self.right(cuts)).sum() + np.abs(self.C).sum())
        rounding = 1e-15 * (p + 2) * p * float(np.trace(S)) + 1e-14 * terms
        return self.value(solution.point, cuts) - self.scale * rounding

    def value(self, point: Point, cuts: Triangles) -> float:
        """The dual's value."""
        return float(point.u.sum() + point.z @ self.right(cuts)) * self.scale + self.constant

    def extended(self, solution: Solution, new: Triangles) -> tuple[Point, Triangles]:
        """A point for the active triangles of a solution along with new ones, and both of these together."""
        point, kept, m = solution.central, solution.active(), len(solution.cuts)
        both = solution.cuts.take(kept).joined(new)
        violation = inner_products(self.unproject(point.Z), new.units, new.signs) + 1
        entering = np.maximum(violation, NEW_SLACK)
        slack = np.concatenate([point.slack[:m][kept], entering, point.slack[m:]])
        z = np.concatenate([point.z[:m][kept], point.mu / entering, point.z[m:]])
        lowest = float(np.linalg.eigvalsh(self.dual(point.u, z, both))[0])
        u = point.u if lowest > 0 else point.u + 1.05 * lowest - 1e-6
        return Point(u, z, point.Z, slack, point.mu), both
