"""The convex lower bound: the best diagonal shift of J, by a primal-dual barrier method.

On {0,1} x² = x, so J may be replaced by J − diag(u) with u added to the linear part: no energy of a state changes, but
those of the points between them do. Where J − diag(u) is positive semidefinite on the directions that keep Σx, the
relaxation over y ∈ [0,1]^n with Σy = M is convex and its minimum is a lower bound. The best u solves

    max_u  min_y  yᵀ(J − diag u)y + (h + u)ᵀy     subject to  Vᵀ(J − diag u)V ⪰ 0,  V a basis of {v : Σv = 0}

(the dual of the semidefinite relaxation; Billionnet, Elloumi and Plateau 2009 call it quadratic convex reformulation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.kernels import kernel

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

MOST_STEPS = 150
SHRINK = 0.15
LEAST_ROOM = 0.03  # slack that a constraint is given at the start, of its largest weight
WARM_ROOM = 1e-2  # distance from the edge of the cone at which a given u is taken up, in units of J's mean diagonal


@dataclass(frozen=True)
class Shift:
    """A valid diagonal shift u [n], the multipliers λ ≥ 0 of the constraints, and the y it was found with.

    Validity (u leaves J convex along Σx = const, λ ≥ 0) is checked at the end by a factorisation and does not depend on
    convergence; only the strength of the bound does.
    """

    u: Vector
    multipliers: Vector
    y: Vector
    value: float


def best_shift(
    J: Matrix,
    h: Vector,
    count: float,
    tolerance: float,
    C: Matrix | None = None,
    bounds: Vector | None = None,
    start: tuple[Vector, Vector] | None = None,
) -> Shift:
    """Find the shift that maximises the bound, to about `tolerance`.

    Args:
        J: Symmetric, [n, n], n ≥ 3.
        h: Linear part, [n].
        count: Σx, strictly between 0 and n; may be fractional.
        tolerance: Absolute, in the unit of the energy.
        C: Constraints Cx ≥ bounds, [c, n]; they only add multipliers to the bound.
        bounds: [c].
        start: A valid u and a y in (0,1)^n to start from, as from a larger problem's solution.

    """
    n = len(h)
    rows = np.zeros((0, n)) if C is None else C
    heaviest = np.maximum(np.abs(rows).max(axis=1, initial=0.0), 1e-300)
    limits = np.zeros(0) if bounds is None else bounds / heaviest
    rows = rows / heaviest[:, None]
    scale = max(float(np.abs(values).mean()) for values in (np.diag(J), J, h)) or 1.0
    barrier = _Barrier(J / scale, h / scale, count, rows, limits, scale)
    u, y, slack, mu = barrier.solve(barrier.start(start), tolerance / scale / (3 * n))
    u, multipliers = make_valid(J, u * scale), mu * scale / slack
    linear = h + u - rows.T @ multipliers
    value = float(y @ (J @ y) - u @ (y * y) + linear @ y + multipliers @ limits)
    return Shift(u, multipliers / heaviest, y, value)


def make_valid(J: Matrix, u: Vector) -> Vector:
    """Lower u until J − diag(u) is positive semidefinite along Σx = const, rounding included.

    A Cholesky factorisation that runs through in floating point proves its matrix positive semidefinite up to about
    n·ε·trace; lowering u by several times that much, once it has, covers it.
    """
    projected = _project(J - np.diag(u))
    lower = 1e-12 * max(float(np.abs(projected).max()), 1e-280)
    while not is_positive_definite(projected.copy()):
        u = u - lower
        lower *= 2
        projected = _project(J - np.diag(u))
    return u - 1e-15 * (len(J) + 2) * float(np.trace(projected))


def _project(A: Matrix) -> Matrix:
    """VᵀAV for an orthonormal basis V of {v : Σv = 0}, by one Householder reflection; [n − 1, n − 1]."""
    w = _householder(len(A))
    Aw = A @ w
    return (A - 2 * np.outer(w, Aw) - 2 * np.outer(Aw, w) + 4 * (w @ Aw) * np.outer(w, w))[1:, 1:]


def _unproject(S: Matrix) -> Matrix:
    """VSVᵀ, [n, n]."""
    n = len(S) + 1
    w = _householder(n)
    A = np.zeros((n, n))
    A[1:, 1:] = S
    Aw = A @ w
    return A - 2 * np.outer(w, Aw) - 2 * np.outer(Aw, w) + 4 * (w @ Aw) * np.outer(w, w)


def _householder(n: int) -> Vector:
    """Unit vector of the reflection that takes the vector of ones to the first axis."""
    w = np.full(n, 1 / np.sqrt(n))
    w[0] += 1.0
    return w / np.linalg.norm(w)


State = tuple[Vector, Vector, Vector, float]  # u, y, slack of the constraints, barrier parameter


class _Barrier:
    """Newton's method on the saddle in (y, u), with barriers for 0 < y < 1, Cy > bounds and the semidefinite cone."""

    def __init__(self, J: Matrix, h: Vector, count: float, C: Matrix, bounds: Vector, scale: float) -> None:
        self.J, self.h, self.count, self.C, self.bounds, self.scale = J, h, count, C, bounds, scale

    def start(self, given: tuple[Vector, Vector] | None) -> State:
        n = len(self.h)
        if given is None:
            u = np.full(n, -float(np.sqrt((self.J**2).sum())) - 1e-3)  # below the smallest eigenvalue
            y = self._interior()
        else:
            u, y = given[0] / self.scale - WARM_ROOM, self._rebalanced(given[1])
        inverse = _unproject(inverse_of(_project(self.J - np.diag(u))))
        mu = float((y - y * y).mean() / np.diag(inverse).mean())
        # Constraints without room inside are loosened: any multiplier λ ≥ 0 is valid, so only strength is at stake.
        room = self.C @ y - self.bounds
        self.bounds = self.bounds - np.maximum(0.0, LEAST_ROOM - room)
        return u, y, self.C @ y - self.bounds, mu

    def _rebalanced(self, y: Vector) -> Vector:
        """A point of the open cube with the right sum, towards y."""
        total, n = float(y.sum()), len(y)
        inner = y * (self.count / total) if total > self.count else 1 - (1 - y) * ((n - self.count) / (n - total))
        return 0.9 * inner + 0.1 * self.count / n

    def _interior(self) -> Vector:
        n = len(self.h)
        middle = np.full(n, self.count / n)
        if len(self.C) == 0:
            return middle
        from scipy.optimize import linprog

        edge = 0.1 * min(middle[0], 1 - middle[0])
        result = linprog(
            np.r_[np.zeros(n), -1.0],
            A_ub=np.c_[-self.C, np.ones(len(self.C))],
            b_ub=-self.bounds,
            A_eq=np.r_[np.ones(n), 0.0][None, :],
            b_eq=[self.count],
            bounds=[*[(edge, 1 - edge)] * n, (None, None)],
        )
        return result.x[:n] if result.status == 0 else middle

    def solve(self, state: State, mu_final: float) -> State:
        for _ in range(MOST_STEPS):
            # A point that reaches the edge of the cube overflows; that ends the method at the one before.
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                step, decrement, moved = self._newton(state)
            if moved is None:
                break
            state = moved
            if step > 0.85 and decrement < 1.0:
                u, y, slack, mu = state
                if mu <= mu_final:
                    break
                state = u, y, slack, max(SHRINK * mu, 0.9 * mu_final)
        return state

    def _newton(self, state: State) -> tuple[float, float, State | None]:
        u, y, slack, mu = state
        n = len(y)
        A = self.J - np.diag(u)
        P = _unproject(inverse_of(_project(A)))
        curvature = 2 * A + np.diag(mu / y**2 + mu / (1 - y) ** 2) + (self.C.T * (mu / slack**2)) @ self.C
        slope = 2 * A @ y + self.h + u - mu / y + mu / (1 - y) - self.C.T @ (mu / slack)
        # In coordinates along Σy = const, the system is symmetric with a positive and a negative definite block.
        w, cross = _householder(n), 1 - 2 * y
        system = np.empty((2 * n - 1, 2 * n - 1))
        system[: n - 1, : n - 1] = _project(curvature)
        system[: n - 1, n - 1 :] = (np.diag(cross) - 2 * np.outer(w, w * cross))[1:]
        system[n - 1 :, n - 1 :] = -mu * P * P
        residual = np.concatenate([(slope - 2 * w * (w @ slope))[1:], y - y * y - mu * np.diag(P)])
        change = solve_quasidefinite(system, -residual)
        dy = np.concatenate([[0.0], change[: n - 1]])
        dy -= 2 * w * (w @ dy)
        du = change[n - 1 :]
        square = float(dy @ curvature @ dy + mu * du @ ((P * P) @ du)) / mu
        if not np.isfinite(square):
            return 0.0, 0.0, None
        decrement = np.sqrt(max(square, 0.0))
        step = min(1.0 if decrement < 1 else 1 / (1 + 0.3 * decrement), _room(y, dy), _room(1 - y, -dy))
        if len(slack):
            step = min(step, _room(slack, self.C @ dy))
        while step > 1e-10 and not is_positive_definite(_project(self.J - np.diag(u + step * du))):
            step *= 0.7
        moved = u + step * du, y + step * dy, slack + step * (self.C @ dy), mu
        stuck = step <= 1e-10 or slack.min(initial=1.0) < 1e-12
        return (0.0, 0.0, None) if stuck else (step, decrement, moved)


def _room(x: Vector, dx: Vector) -> float:
    """Largest step, up to 1, that keeps 5 % of the distance of x to 0."""
    falling = dx < 0
    return min(1.0, float((0.95 * x[falling] / -dx[falling]).min())) if falling.any() else 1.0


@kernel
def is_positive_definite(S):  # type: ignore[no-untyped-def]
    """Whether the Cholesky factorisation of a symmetric matrix runs through; S is overwritten."""
    n = len(S)
    for k in range(n):
        pivot = S[k, k]
        if not pivot > 0:
            return False
        for i in range(k + 1, n):
            factor = S[k, i] / pivot
            row, above = S[i], S[k]
            for j in range(i, n):
                row[j] -= factor * above[j]
    return True


@kernel
def solve_quasidefinite(A, b):  # type: ignore[no-untyped-def]
    """Solve Ax = b for a symmetric quasidefinite A (its upper triangle, overwritten) by LDLᵀ without pivoting."""
    n = len(b)
    x = b.copy()
    for k in range(n):
        pivot = A[k, k]
        above = A[k]
        for i in range(k + 1, n):
            factor = above[i] / pivot
            row = A[i]
            for j in range(i, n):
                row[j] -= factor * above[j]
            x[i] -= factor * x[k]
    for k in range(n - 1, -1, -1):
        total = x[k]
        row = A[k]
        for j in range(k + 1, n):
            total -= row[j] * x[j]
        x[k] = total / A[k, k]
    return x


@kernel
def inverse_of(S):  # type: ignore[no-untyped-def]
    """Inverse of a symmetric positive definite matrix by Gauss-Jordan elimination; S is overwritten."""
    n = len(S)
    for k in range(n):
        pivot = 1 / S[k, k]
        row = S[k]
        for i in range(n):
            if i != k:
                other = S[i]
                factor = other[k] * pivot
                other[k] = 0.0
                for j in range(n):
                    other[j] -= factor * row[j]
                other[k] = -factor
        for j in range(n):
            row[j] *= pivot
        row[k] = pivot
    return S
