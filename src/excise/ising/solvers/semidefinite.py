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
from scipy.linalg import cho_factor, cho_solve, eigh, solve_triangular

from excise.ising.solvers.triangles import Triangles, add_triangles, inner_products, no_triangles, schur

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

MOST_STEPS = 40
STEP = 0.97  # of the way to the edge of the cones
LEAST_STEP = 1e-6
ENOUGH = 0.02  # of the distance to a target that is out of reach
NEW_SLACK = 0.5  # that an inequality is given where it enters, of the 1 that independent spins have


class Point(NamedTuple):
    """Strictly inside all cones: S(u, z) ≻ 0, z > 0, Z ≻ 0, slack > 0; `mu` is the mean complementarity."""

    u: Vector  # [p]
    z: Vector  # [triangles + constraints]
    Z: Matrix  # [n, n], Y = VZVᵀ
    slack: Vector  # [triangles + constraints]
    mu: float


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

    def project(self, A: Matrix) -> Matrix:
        """VᵀAV, [n, n]."""
        return self._reflect(A)[1:, 1:]

    def unproject(self, Z: Matrix) -> Matrix:
        """VZVᵀ, [p, p]."""
        A = np.zeros((len(Z) + 1, len(Z) + 1))
        A[1:, 1:] = Z
        return self._reflect(A)

    def _reflect(self, A: Matrix) -> Matrix:
        w = self.mirror
        Aw = A @ w
        cross = np.outer(w, Aw)
        return A - 2 * (cross + cross.T) + (4 * (w @ Aw)) * np.outer(w, w)

    def combined(self, u: Vector, z: Vector, cuts: Triangles) -> Matrix:
        """Sum of multipliers and what they multiply, diag u + Σ λ_c B_c + Σ z_k A_k, [p, p]."""
        A = np.diag(u)
        row = z[len(cuts) :] @ self.rows
        A[0, 1:] += row
        A[1:, 0] += row
        add_triangles(A, cuts.units, cuts.signs, z[: len(cuts)])
        return A

    def dual(self, u: Vector, z: Vector, cuts: Triangles) -> Matrix:
        """S, [n, n]."""
        return self.project(self.C - self.combined(u, z, cuts))

    def products(self, Y: Matrix, cuts: Triangles) -> Vector:
        """⟨A_k, Y⟩ and ⟨B_c, Y⟩, [triangles + constraints]."""
        return np.concatenate([inner_products(Y, cuts.units, cuts.signs), 2 * self.rows @ Y[0, 1:]])

    def right(self, cuts: Triangles) -> Vector:
        """What these products are at least."""
        return np.concatenate([np.full(len(cuts), -1.0), self.limits])

    def start(self) -> Point:
        """A point for no triangles."""
        p, n = len(self.C), len(self.C) - 1
        z = np.full(len(self.limits), 1e-3)
        u = np.full(p, -float(np.abs(self.C).sum(axis=1).max()) - float(np.abs(self.rows).sum()) - 1e-2)
        Z = np.eye(n) * (p / n)
        slack = np.ones(len(z))
        return Point(u, z, Z, slack, float(np.trace(self.dual(u, z, no_triangles())) + z.sum()) / (n + len(z)))

    def solve(
        self, start: Point, cuts: Triangles, tolerance: float, target: float = np.inf, near: float = 0.0
    ) -> Solution:
        """Follow the central path until primal and dual differ by `tolerance` or the dual exceeds `target`.

        Args:
            start: A point for these cuts.
            cuts: Triangle inequalities.
            tolerance: Absolute, in the unit of the energy.
            target: Likewise.
            near: Duality gap below which a point is too close to the edge to start others from, in the same unit.

        """
        point = central = start
        value = -np.inf
        size = len(start.Z) + len(start.z)
        for _ in range(MOST_STEPS):
            try:
                with np.errstate(over="raise", divide="raise", invalid="raise"):
                    moved = self._step(point, cuts)
            except (np.linalg.LinAlgError, ArithmeticError):  # at the edge, or where no state meets the constraints
                break
            if moved is None:
                break
            point = moved
            if point.mu * self.scale * size > near:
                central = point
            value = self.value(point, cuts)
            primal = float((self.C * self.unproject(point.Z)).sum()) * self.scale + self.constant
            hopeless = primal < target and primal - value < ENOUGH * (target - value)
            if value > target or hopeless or abs(primal - value) < tolerance:
                break
        return Solution(point, central, cuts, value)

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
        lowest = self._lowest(self.dual(point.u, z, both))
        u = point.u if lowest > 0 else point.u + 1.05 * lowest - 1e-6
        return Point(u, z, point.Z, slack, point.mu), both

    @staticmethod
    def _lowest(A: Matrix) -> float:
        return float(eigh(A, eigvals_only=True, subset_by_index=[0, 0], check_finite=False)[0])

    def _step(self, point: Point, cuts: Triangles) -> Point | None:
        u, z, Z, slack, _ = point
        p, size = len(u), len(Z) + len(z)
        S = self.dual(u, z, cuts)
        root_S, root_Z = np.linalg.cholesky(S), np.linalg.cholesky(Z)
        inverse = np.linalg.inv(S)
        inverse = (inverse + inverse.T) / 2
        P, Y = self.unproject(inverse), self.unproject(Z)
        factor = cho_factor(self._system(Y, P, z, slack, cuts), lower=True, overwrite_a=True, check_finite=False)
        mu = float((Z * S).sum() + z @ slack) / size
        if not mu > 0:
            return None

        def direction(aim: float, second: Matrix | float, second_z: Vector | float) -> tuple[Vector, ...]:
            """Towards complementarity `aim`, less the second-order terms."""
            goal = aim * inverse - second
            lifted = self.unproject(goal)
            wanted = (aim - second_z) / z
            rest = np.concatenate([1 - np.diag(lifted), wanted + self.right(cuts) - self.products(lifted, cuts)])
            change = cho_solve(factor, rest, check_finite=False)
            du, dz = change[:p], change[p:]
            dS = -self.project(self.combined(du, dz, cuts))
            product = Z @ dS @ inverse
            dZ = goal - Z - (product + product.T) / 2
            return du, dz, dS, dZ, wanted - slack - slack * dz / z

        def lengths(move: tuple[Vector, ...]) -> tuple[float, float]:
            _, dz, dS, dZ, dslack = move
            return (
                min(self._length(root_Z, dZ), _length(slack, dslack)),
                min(self._length(root_S, dS), _length(z, dz)),
            )

        affine = direction(0.0, 0.0, 0.0)
        primal, dual = lengths(affine)
        _, dz, dS, dZ, dslack = affine
        left = float(((Z + primal * dZ) * (S + dual * dS)).sum() + (z + dual * dz) @ (slack + primal * dslack)) / size
        product = dZ @ dS @ inverse
        aim = mu * min(max((left / mu) ** 2, 0.01), 0.8)
        du, dz, dS, dZ, dslack = move = direction(aim, (product + product.T) / 2, dslack * dz)
        primal, dual = lengths(move)
        if not max(primal, dual) > LEAST_STEP:
            return None
        u, z, Z, slack = u + dual * du, z + dual * dz, Z + primal * dZ, slack + primal * dslack
        return Point(u, z, Z, slack, float((Z * (S + dual * dS)).sum() + z @ slack) / size)

    def _system(self, Y: Matrix, P: Matrix, z: Vector, slack: Vector, cuts: Triangles) -> Matrix:
        """The lower triangle of the Newton system in (u, λ, z), [p + constraints + triangles] twice."""
        p, m = len(Y), len(cuts)
        M = np.empty((p + len(z), p + len(z)))
        schur(Y, P, cuts.units, cuts.signs, M)
        for c, row in enumerate(self.rows):
            B = np.zeros((p, p))
            B[0, 1:] = B[1:, 0] = row
            product = Y @ B @ P
            product = (product + product.T) / 2
            M[p + m + c] = np.concatenate([np.diag(product), self.products(product, cuts)])
        places = np.arange(p, p + len(z))
        M[places, places] += slack / z
        return M

    @staticmethod
    def _length(root: NDArray[np.floating], change: Matrix) -> float:
        scaled = solve_triangular(root, change, lower=True, check_finite=False)
        scaled = solve_triangular(root, scaled.T, lower=True, check_finite=False)
        lowest = Relaxation._lowest((scaled + scaled.T) / 2)
        return 1.0 if lowest > -STEP else -STEP / lowest


def _length(x: Vector, change: Vector) -> float:
    falling = change < 0
    return min(1.0, float((STEP * x[falling] / -change[falling]).min())) if falling.any() else 1.0
