"""Triangle inequalities: which ones a point violates, and what they do in the semidefinite relaxation's kernels.

Of any three spins s ∈ {−1, 1} an even number of the pairs differ, so for signs σ with σ₁σ₂σ₃ = 1

    σ₁ s_i s_j + σ₂ s_i s_k + σ₃ s_j s_k ≥ −1,

four inequalities for each three units. Unit 0 is the constant spin 1, which makes those with it the products of the
bounds 0 ≤ x ≤ 1 with one another (the reformulation-linearisation technique).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.kernels import kernel

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

MOST_CANDIDATES = 400_000


@dataclass(frozen=True)
class Triangles:
    """Inequalities, each over three units of the lifted problem."""

    units: NDArray[np.int64]  # [m, 3], ascending in each row
    signs: NDArray[np.float64]  # [m, 3], of the pairs (0, 1), (0, 2), (1, 2) of the row

    def __len__(self) -> int:
        return len(self.units)

    def take(self, chosen: NDArray[np.generic]) -> Triangles:
        """Some of them, by a mask or by places."""
        return Triangles(self.units[chosen], self.signs[chosen])

    def joined(self, others: Triangles) -> Triangles:
        """These, then the others."""
        return Triangles(np.concatenate([self.units, others.units]), np.concatenate([self.signs, others.signs]))

    def named(self, free: NDArray[np.int64]) -> Triangles:
        """The same over all units, from triangles over the units `free` alone."""
        return Triangles(np.concatenate([[0], free + 1])[self.units], self.signs)

    def among(self, free: NDArray[np.int64], n: int) -> Triangles:
        """Those that hold the constant and the units `free`, of n, only; numbered among these."""
        place = np.full(n + 1, -1, dtype=np.int64)
        place[0] = 0
        place[free + 1] = np.arange(1, len(free) + 1)
        units = place[self.units]
        inside = (units >= 0).all(axis=1)
        return Triangles(units[inside], self.signs[inside])


def no_triangles() -> Triangles:
    """None of them."""
    return Triangles(np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3)))


def violated(Y: Matrix, least: float, most: int) -> Triangles:
    """The inequalities that Y [p, p] violates worst, by more than `least`; at most `most` of them."""
    amounts = np.empty(MOST_CANDIDATES)
    units = np.empty((MOST_CANDIDATES, 3), dtype=np.int64)
    signs = np.empty((MOST_CANDIDATES, 3))
    found = _violated(Y, least, amounts, units, signs)
    chosen = np.argsort(-amounts[:found], kind="stable")[:most]
    return Triangles(units[chosen], signs[chosen])


@kernel
def _violated(Y, least, amounts, units, signs):  # type: ignore[no-untyped-def]
    p, found = len(Y), 0
    for i in range(p):
        for j in range(i + 1, p):
            for k in range(j + 1, p):
                a, b, c = Y[i, j], Y[i, k], Y[j, k]
                if min(min(a + b + c, a - b - c), min(b - a - c, c - a - b)) >= -1 - least:
                    continue
                for sign in range(4):
                    first = 1.0 if sign < 2 else -1.0
                    second = 1.0 if sign % 2 == 0 else -1.0
                    amount = -1 - (first * a + second * b + first * second * c)
                    if amount > least and found < len(amounts):
                        amounts[found] = amount
                        units[found, 0], units[found, 1], units[found, 2] = i, j, k
                        signs[found, 0], signs[found, 1], signs[found, 2] = first, second, first * second
                        found += 1
    return found


@kernel
def inner_products(Y, units, signs):  # type: ignore[no-untyped-def]
    """⟨A_k, Y⟩ = σ₁Y_ij + σ₂Y_ik + σ₃Y_jk of each inequality, [m]."""
    values = np.empty(len(units))
    for k in range(len(units)):
        a, b, c = units[k]
        values[k] = signs[k, 0] * Y[a, b] + signs[k, 1] * Y[a, c] + signs[k, 2] * Y[b, c]
    return values


@kernel
def add_triangles(S, units, signs, weights):  # type: ignore[no-untyped-def]
    """Add Σ weights_k A_k to S, in place."""
    for k in range(len(units)):
        a, b, c = units[k]
        half = 0.5 * weights[k]
        S[a, b] += half * signs[k, 0]
        S[b, a] += half * signs[k, 0]
        S[a, c] += half * signs[k, 1]
        S[c, a] += half * signs[k, 1]
        S[b, c] += half * signs[k, 2]
        S[c, b] += half * signs[k, 2]


@kernel
def schur(Y, P, units, signs, M):  # type: ignore[no-untyped-def]
    """Lower triangle of ⟨A_k, Y A_l P⟩ for the p diagonal entries and then the inequalities, into M [p + m, p + m]."""
    p, m = len(Y), len(units)
    left = np.empty((3, p))
    for i in range(p):
        for j in range(i + 1):
            M[i, j] = Y[i, j] * P[i, j]
    for k in range(m):
        a, b, c = units[k]
        half_ab, half_ac, half_bc = 0.5 * signs[k, 0], 0.5 * signs[k, 1], 0.5 * signs[k, 2]
        for q in range(p):
            M[p + k, q] = (
                half_ab * (Y[a, q] * P[b, q] + Y[b, q] * P[a, q])
                + half_ac * (Y[a, q] * P[c, q] + Y[c, q] * P[a, q])
                + half_bc * (Y[b, q] * P[c, q] + Y[c, q] * P[b, q])
            )
        # Rows of Y A_k and P A_k are combinations of three rows each; of them, other inequalities need nine entries.
        for q in range(p):
            left[0, q] = half_ab * Y[b, q] + half_ac * Y[c, q]
            left[1, q] = half_ab * Y[a, q] + half_bc * Y[c, q]
            left[2, q] = half_ac * Y[a, q] + half_bc * Y[b, q]
        Pa, Pb, Pc = P[a], P[b], P[c]
        La, Lb, Lc = left[0], left[1], left[2]
        for other in range(k + 1):
            x, y, z = units[other]
            xy = La[x] * Pa[y] + Lb[x] * Pb[y] + Lc[x] * Pc[y] + La[y] * Pa[x] + Lb[y] * Pb[x] + Lc[y] * Pc[x]
            xz = La[x] * Pa[z] + Lb[x] * Pb[z] + Lc[x] * Pc[z] + La[z] * Pa[x] + Lb[z] * Pb[x] + Lc[z] * Pc[x]
            yz = La[y] * Pa[z] + Lb[y] * Pb[z] + Lc[y] * Pc[z] + La[z] * Pa[y] + Lb[z] * Pb[y] + Lc[z] * Pc[y]
            M[p + k, p + other] = 0.5 * (signs[other, 0] * xy + signs[other, 1] * xz + signs[other, 2] * yz)
