"""The compiled interior-point method under the semidefinite relaxation: its Newton system, directions and steps.

All of it runs without the interpreter lock, so that threads that bound nodes do not wait for one another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.kernels import inner_kernel, kernel
from excise.ising.solvers.triangles import add_triangles, inner_products, schur

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

MOST_STEPS = 40
STEP = 0.97  # of the way to the edge of the cones
ROUGH_STEPS = (0.97, 0.85, 0.7, 0.5, 0.3, 0.1)  # tried for the predictor, whose length only sets the aim
LEAST_STEP = 1e-6
ENOUGH = 0.02  # of the distance to a target that is out of reach


class Point(NamedTuple):
    """Strictly inside all cones: S(u, z) ≻ 0, z > 0, Z ≻ 0, slack > 0; `mu` is the mean complementarity."""

    u: Vector  # [p]
    z: Vector  # [triangles + constraints]
    Z: Matrix  # [n, n], Y = VZVᵀ
    slack: Vector  # [triangles + constraints]
    mu: float


class Form(NamedTuple):
    """What the method reads: min ⟨C, Y⟩ over diag Y = 1, ⟨A_k, Y⟩ ≥ right_k, Y = VZVᵀ, Z ⪰ 0."""

    C: Matrix  # [p, p]
    mirror: Vector  # [p], unit vector of the reflection whose columns but the first are V
    rows: Matrix  # [constraints, p − 1]: constraint c is 2 · rows_c · Y[0, 1:]
    units: NDArray[np.int64]  # [triangles, 3]
    signs: Matrix  # [triangles, 3]
    right: Vector  # [triangles + constraints]


class _Move(NamedTuple):
    """A change of a point, with that of S."""

    u: Vector
    z: Vector
    Z: Matrix
    S: Matrix
    slack: Vector


@kernel
def follow(form, start, tolerance, target, near):  # type: ignore[no-untyped-def]
    """Follow the central path until primal and dual differ by `tolerance` or the dual exceeds `target`.

    A target that is out of reach ends it too, once the dual is close to what it can be. `near` is the duality gap below
    which a point is too close to the edge of the cones to start others from. Returns the last point, the last that was
    not too close, and the dual's value there, which is −∞ where no step was possible. All in the unit of C.
    """
    point = central = start
    value = -np.inf
    size = len(start.Z) + len(start.z)
    projected = project(form.C, form.mirror)
    for _ in range(MOST_STEPS):
        moved, good = _step(form, point)
        if not good:
            break
        point = moved
        if point.mu * size > near:
            central = point
        value = point.u.sum() + (point.z * form.right).sum()
        primal = (projected * point.Z).sum()
        hopeless = primal < target < np.inf and primal - value < ENOUGH * (target - value)
        if value > target or hopeless or abs(primal - value) < tolerance:
            break
    return point, central, value


@kernel
def project(A, w):  # type: ignore[no-untyped-def]
    """VᵀAV, [p − 1, p − 1]: A reflected by the unit vector w, without the first axis."""
    return _reflect(A, w, 1)


@kernel
def unproject(Z, w):  # type: ignore[no-untyped-def]
    """VZVᵀ, [p, p]."""
    A = np.zeros((len(w), len(w)))
    A[1:, 1:] = Z
    return _reflect(A, w, 0)


@inner_kernel
def _reflect(A, w, first):  # type: ignore[no-untyped-def]
    """(I − 2wwᵀ)A(I − 2wwᵀ) for a symmetric A, from row and column `first` on."""
    p = len(w)
    Aw = np.zeros(p)
    for i in range(p):
        total = 0.0
        for j in range(p):
            total += A[i, j] * w[j]
        Aw[i] = total
    square = (w * Aw).sum()
    B = np.empty((p - first, p - first))
    for i in range(first, p):
        own, across = 2 * w[i], 2 * Aw[i] - 4 * square * w[i]
        for j in range(first, p):
            B[i - first, j - first] = A[i, j] - own * Aw[j] - across * w[j]
    return B


@kernel
def combined(form, u, z):  # type: ignore[no-untyped-def]
    """Sum of multipliers and what they multiply, diag u + Σ λ_c B_c + Σ z_k A_k, [p, p]."""
    A = np.diag(u)
    m = len(form.units)
    for c in range(len(form.rows)):
        A[0, 1:] += z[m + c] * form.rows[c]
        A[1:, 0] += z[m + c] * form.rows[c]
    add_triangles(A, form.units, form.signs, z[:m])
    return A


@kernel
def products(form, Y):  # type: ignore[no-untyped-def]
    """⟨A_k, Y⟩ and ⟨B_c, Y⟩, [triangles + constraints]."""
    m = len(form.units)
    values = np.empty(len(form.right))
    values[:m] = inner_products(Y, form.units, form.signs)
    for c in range(len(form.rows)):
        values[m + c] = 2 * (form.rows[c] * Y[0, 1:]).sum()
    return values


@inner_kernel
def _step(form, point):  # type: ignore[no-untyped-def]
    """One step, with Mehrotra's corrector; and whether it could be made."""
    u, z, Z, slack, _ = point
    w, size = form.mirror, len(Z) + len(z)
    S = project(form.C - combined(form, u, z), w)
    root_S, good = _inverse_root(S)
    if not good:
        return point, False
    root_Z, good = _inverse_root(Z)
    if not good:
        return point, False
    inverse = root_S.T @ root_S
    mu = ((Z * S).sum() + (z * slack).sum()) / size
    if not 0 < mu < np.inf:
        return point, False
    factor, good = _factor(_system(form, unproject(Z, w), unproject(inverse, w), z, slack))
    if not good:
        return point, False
    affine = _direction(form, point, inverse, factor, 0.0, np.zeros_like(Z), np.zeros_like(z))
    primal = min(_rough_length(Z, affine.Z), _length(slack, affine.slack))
    dual = min(_rough_length(S, affine.S), _length(z, affine.z))
    left = ((Z + primal * affine.Z) * (S + dual * affine.S)).sum()
    left = (left + ((z + dual * affine.z) * (slack + primal * affine.slack)).sum()) / size
    aim = mu * min(max((left / mu) ** 2, 0.01), 0.8)
    second = affine.Z @ affine.S @ inverse
    move = _direction(form, point, inverse, factor, aim, (second + second.T) / 2, affine.slack * affine.z)
    primal = min(_cone_length(root_Z, move.Z), _length(slack, move.slack))
    dual = min(_cone_length(root_S, move.S), _length(z, move.z))
    if not max(primal, dual) > LEAST_STEP:
        return point, False
    u, z, Z, slack = u + dual * move.u, z + dual * move.z, Z + primal * move.Z, slack + primal * move.slack
    mu = ((Z * (S + dual * move.S)).sum() + (z * slack).sum()) / size
    return Point(u, z, Z, slack, mu), np.isfinite(mu) and np.isfinite(u.sum())


@inner_kernel
def _direction(form, point, inverse, factor, aim, second, second_z):  # type: ignore[no-untyped-def]
    """Towards complementarity `aim`, less the second-order terms."""
    _, z, Z, slack, _ = point
    p = len(form.C)
    goal = aim * inverse - second
    lifted = unproject(goal, form.mirror)
    wanted = (aim - second_z) / z
    rest = np.empty(p + len(z))
    rest[:p] = 1 - np.diag(lifted)
    rest[p:] = wanted + form.right - products(form, lifted)
    _solve(factor, rest)
    du, dz = rest[:p].copy(), rest[p:].copy()
    dS = -project(combined(form, du, dz), form.mirror)
    product = Z @ dS @ inverse
    dZ = goal - Z - (product + product.T) / 2
    return _Move(du, dz, dZ, dS, wanted - slack - slack * dz / z)


@inner_kernel
def _system(form, Y, P, z, slack):  # type: ignore[no-untyped-def]
    """The lower triangle of the Newton system in (u, z), [p + triangles + constraints] twice."""
    p, m = len(Y), len(form.units)
    M = np.zeros((p + len(z), p + len(z)))
    schur(Y, P, form.units, form.signs, M)
    for c in range(len(form.rows)):
        Yr, Pr = np.zeros(p), np.zeros(p)
        for i in range(p):
            Yr[i] = (Y[i, 1:] * form.rows[c]).sum()
            Pr[i] = (P[i, 1:] * form.rows[c]).sum()
        product = np.outer(Y[:, 0], Pr) + np.outer(Yr, P[0])
        product = (product + product.T) / 2
        M[p + m + c, :p] = np.diag(product)
        M[p + m + c, p:] = products(form, product)
    for k in range(len(z)):
        M[p + k, p + k] += slack[k] / z[k]
    return M


@inner_kernel
def _factor(A):  # type: ignore[no-untyped-def]
    """L of A = LLᵀ, and whether A is positive definite."""
    try:
        return np.linalg.cholesky(A), True
    except Exception:  # the only class that compiled code can name
        return np.asfortranarray(A), False


@inner_kernel
def _inverse_root(A):  # type: ignore[no-untyped-def]
    """L⁻¹ of A = LLᵀ, and whether A is positive definite."""
    L, good = _factor(A)
    n = len(A)
    X = np.zeros((n, n))
    if not good:
        return X, False
    for i in range(n):
        row = X[i]
        for k in range(i):
            factor, above = L[i, k], X[k]
            for j in range(k + 1):
                row[j] -= factor * above[j]
        pivot = 1 / L[i, i]
        for j in range(i):
            row[j] *= pivot
        row[i] = pivot
    return X, True


@inner_kernel
def _solve(L, x):  # type: ignore[no-untyped-def]
    """Solve LLᵀx = b, in place of b; the columns of L are contiguous."""
    n = len(x)
    for k in range(n):
        x[k] /= L[k, k]
        x[k + 1 :] -= x[k] * L[k + 1 :, k]
    for k in range(n - 1, -1, -1):
        x[k] = (x[k] - (L[k + 1 :, k] * x[k + 1 :]).sum()) / L[k, k]


@inner_kernel
def _rough_length(A, change):  # type: ignore[no-untyped-def]
    """A step along `change` that stays in the cone, of a few tried."""
    for step in ROUGH_STEPS:
        if _factor(A + step * change)[1]:
            return step
    return 0.0


@inner_kernel
def _cone_length(root, change):  # type: ignore[no-untyped-def]
    """The longest step, up to 1, that goes `STEP` of the way to the edge of the cone."""
    try:
        lowest = np.linalg.eigvalsh(root @ change @ root.T)[0]
    except Exception:  # at the edge of the cones, where numbers overflow
        return 0.0
    return 1.0 if lowest > -STEP else -STEP / lowest


@inner_kernel
def _length(x, change):  # type: ignore[no-untyped-def]
    step = 1.0
    for k in range(len(x)):
        if change[k] < 0:
            step = min(step, STEP * x[k] / -change[k])
    return step
