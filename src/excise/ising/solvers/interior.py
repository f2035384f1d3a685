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

STEP = 0.97  # of the way to the edge of the cones
ROUGH_STEPS = (0.97, 0.85, 0.7, 0.5, 0.3, 0.1)  # tried for the predictor, whose length only sets the aim
LEAST_STEP = 1e-6


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
def project(A, w):  # type: ignore[no-untyped-def]
    """VᵀAV, [p − 1, p − 1]: A reflected by the unit vector w, without the first axis."""
    return _reflect(A, w, 1)


@kernel
def unproject(Z, w):  # type: ignore[no-untyped-def]
    """VZVᵀ, [p, p]."""
    A = np.zeros((len(w), len(w)))
    for i in range(len(Z)):
        for j in range(len(Z)):
            A[i + 1, j + 1] = Z[i, j]
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
    square = _dot(w, Aw)
    B = np.empty((p - first, p - first))
    for i in range(first, p):
        own, across = 2 * w[i], 2 * Aw[i] - 4 * square * w[i]
        for j in range(first, p):
            B[i - first, j - first] = A[i, j] - own * Aw[j] - across * w[j]
    return B


@kernel
def combined(form, u, z):  # type: ignore[no-untyped-def]
    """Sum of multipliers and what they multiply, diag u + Σ λ_c B_c + Σ z_k A_k, [p, p]."""
    p, m = len(u), len(form.units)
    A = np.zeros((p, p))
    for i in range(p):
        A[i, i] = u[i]
    for c in range(len(form.rows)):
        for i in range(1, p):
            A[0, i] += z[m + c] * form.rows[c, i - 1]
            A[i, 0] += z[m + c] * form.rows[c, i - 1]
    add_triangles(A, form.units, form.signs, z)
    return A


@inner_kernel
def _products(form, Y):  # type: ignore[no-untyped-def]
    """⟨A_k, Y⟩ and ⟨B_c, Y⟩, [triangles + constraints]."""
    m = len(form.units)
    values = np.empty(len(form.right))
    triangles = inner_products(Y, form.units, form.signs)
    for k in range(m):
        values[k] = triangles[k]
    for c in range(len(form.rows)):
        total = 0.0
        for i in range(1, len(Y)):
            total += form.rows[c, i - 1] * Y[0, i]
        values[m + c] = 2 * total
    return values


@kernel
def step(form, point):  # type: ignore[no-untyped-def]
    """One step along the central path, with Mehrotra's corrector; and whether it could be made."""
    u, z, Z, slack, _ = point
    w, size = form.mirror, len(Z) + len(z)
    S = dual(form, u, z, 1.0)
    root_S, good_S = _inverse_root(S)
    root_Z, good_Z = _inverse_root(Z)
    mu = (_inner(Z, S) + _dot(z, slack)) / size
    if not (good_S and good_Z and 0 < mu < np.inf):
        return point, False
    inverse = root_S.T @ root_S
    factor, good = _factor(_system(form, unproject(Z, w), unproject(inverse, w), z, slack))
    if not good:
        return point, False
    affine = _direction(form, point, inverse, factor, 0.0, np.zeros_like(Z), np.zeros_like(z))
    primal = min(_rough_length(Z, affine.Z), _length(slack, affine.slack))
    other = min(_rough_length(S, affine.S), _length(z, affine.z))
    left = _inner(Z, S) + primal * _inner(affine.Z, S) + other * _inner(Z, affine.S)
    left += primal * other * (_inner(affine.Z, affine.S) + _dot(affine.slack, affine.z))
    left += _dot(z, slack) + primal * _dot(z, affine.slack) + other * _dot(affine.z, slack)
    aim = mu * min(max((left / size / mu) ** 2, 0.01), 0.8)
    second = _symmetric(affine.Z @ affine.S @ inverse)
    for k in range(len(z)):
        affine.z[k] *= affine.slack[k]
    move = _direction(form, point, inverse, factor, aim, second, affine.z)
    primal = min(_cone_length(root_Z, move.Z), _length(slack, move.slack))
    other = min(_cone_length(root_S, move.S), _length(z, move.z))
    if not max(primal, other) > LEAST_STEP:
        return point, False
    u, z, slack = _moved(u, other, move.u), _moved(z, other, move.z), _moved(slack, primal, move.slack)
    Z, S = _shifted(Z, primal, move.Z), _shifted(S, other, move.S)
    mu = (_inner(Z, S) + _dot(z, slack)) / size
    return Point(u, z, Z, slack, mu), True


@kernel
def dual(form, u, z, constant):  # type: ignore[no-untyped-def]
    """Vᵀ(constant · C − what the multipliers multiply)V, [n, n]."""
    A = combined(form, u, z)
    for i in range(len(A)):
        for j in range(len(A)):
            A[i, j] = constant * form.C[i, j] - A[i, j]
    return project(A, form.mirror)


@inner_kernel
def _direction(form, point, inverse, factor, aim, second, second_z):  # type: ignore[no-untyped-def]
    """Towards complementarity `aim`, less the second-order terms."""
    _, z, Z, slack, _ = point
    p, n, m = len(form.C), len(Z), len(z)
    goal = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            goal[i, j] = aim * inverse[i, j] - second[i, j]
    lifted = unproject(goal, form.mirror)
    held = _products(form, lifted)
    rest, wanted = np.empty(p + m), np.empty(m)
    for i in range(p):
        rest[i] = 1 - lifted[i, i]
    for k in range(m):
        wanted[k] = (aim - second_z[k]) / z[k]
        rest[p + k] = wanted[k] + form.right[k] - held[k]
    _solve(factor, rest)
    du, dz = rest[:p].copy(), rest[p:].copy()
    dS = dual(form, du, dz, 0.0)
    dZ = _symmetric(Z @ dS @ inverse)
    for i in range(n):
        for j in range(n):
            dZ[i, j] = goal[i, j] - Z[i, j] - dZ[i, j]
    for k in range(m):
        wanted[k] -= slack[k] + slack[k] * dz[k] / z[k]
    return _Move(du, dz, dZ, dS, wanted)


@inner_kernel
def _system(form, Y, P, z, slack):  # type: ignore[no-untyped-def]
    """The lower triangle of the Newton system in (u, z), [p + triangles + constraints] twice."""
    p, m = len(Y), len(form.units)
    M = np.zeros((p + len(z), p + len(z)))
    schur(Y, P, form.units, form.signs, M)
    product, Yr, Pr = np.empty((p, p)), np.empty(p), np.empty(p)
    for c in range(len(form.rows)):
        for i in range(p):
            Yr[i], Pr[i] = 0.0, 0.0
            for j in range(1, p):
                Yr[i] += Y[i, j] * form.rows[c, j - 1]
                Pr[i] += P[i, j] * form.rows[c, j - 1]
        for i in range(p):
            for j in range(p):
                product[i, j] = 0.5 * (Y[i, 0] * Pr[j] + Yr[i] * P[0, j] + Y[j, 0] * Pr[i] + Yr[j] * P[0, i])
        held = _products(form, product)
        for i in range(p):
            M[p + m + c, i] = product[i, i]
        for k in range(len(z)):
            M[p + m + c, p + k] = held[k]
    for k in range(len(z)):
        M[p + k, p + k] += slack[k] / z[k]
    return M


@inner_kernel
def _inner(A, B):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(A)):
        for j in range(len(A)):
            total += A[i, j] * B[i, j]
    return total


@inner_kernel
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(len(x)):
        total += x[k] * y[k]
    return total


@inner_kernel
def _moved(x, length, change):  # type: ignore[no-untyped-def]
    moved = np.empty(len(x))
    for k in range(len(x)):
        moved[k] = x[k] + length * change[k]
    return moved


@inner_kernel
def _shifted(A, length, change):  # type: ignore[no-untyped-def]
    B = np.empty((len(A), len(A)))
    for i in range(len(A)):
        for j in range(len(A)):
            B[i, j] = A[i, j] + length * change[i, j]
    return B


@inner_kernel
def _symmetric(A):  # type: ignore[no-untyped-def]
    """The symmetric part of A, in its place."""
    for i in range(len(A)):
        for j in range(i):
            A[i, j] = A[j, i] = (A[i, j] + A[j, i]) / 2
    return A


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
        known = x[k]
        for i in range(k + 1, n):
            x[i] -= known * L[i, k]
    for k in range(n - 1, -1, -1):
        total = x[k]
        for i in range(k + 1, n):
            total -= L[i, k] * x[i]
        x[k] = total / L[k, k]


@inner_kernel
def _rough_length(A, change):  # type: ignore[no-untyped-def]
    """A step along `change` that stays in the cone, of a few tried."""
    for length in ROUGH_STEPS:
        if _factor(_shifted(A, length, change))[1]:
            return length
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
