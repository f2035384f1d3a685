"""The paper's energy after the kept gates have moved to make up for a removal; not quadratic in x.

With gates α = 1 + δ and the quadratic model δᵀHδ of the loss, removing the gates R sets δ_R = −1. Where the kept gates
K may move, the best they can do is a Gauss–Newton step in closed form, and what is left is a Schur complement:

    α_K = 1 + H_KK⁻¹ H_KR 1,        E(R) = 1ᵀ (H_RR − H_RK H_KK⁻¹ H_KR) 1 = 1ᵀ ((H⁻¹)_RR)⁻¹ 1.

H = AᵀA/m is singular for few samples, so ridge · s I is added to it, s its mean diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike

from excise.errors import InputError
from excise.ising.energies.fisher import gradient_matrix, second_moment

RIDGE = 0.1


@dataclass(frozen=True, eq=False)
class RepairedFisher:
    """E(R) for every set of units, each of one or more gates.

    Attributes:
        inverse: (H + ridge · s I)⁻¹ [gates, gates].
        owners: unit of each gate [gates].

    """

    inverse: Float64[np.ndarray, "gates gates"]
    owners: Int[np.ndarray, " gates"]

    @staticmethod
    def of(A: ArrayLike, owners: Sequence[int] | None = None, ridge: float = RIDGE) -> RepairedFisher:
        """The energy that follows from gradients.

        Args:
            A: per-sample gradients of the loss with respect to the gates, [m samples, gates], nats.
            owners: unit of each gate [gates]; None makes every gate a unit of its own.
            ridge: > 0, relative to the mean diagonal of H.

        Raises:
            InputError: A is not a finite matrix, is all zeros, or does not fit the owners; or the ridge is not above 0.

        >>> energy = RepairedFisher.of([[1.0, 1.0], [1.0, 1.0]], ridge=1e-9)
        >>> [round(value, 6) for value in energy.energies([(0,), (0, 1)])]  # the other gate makes up for one alone
        [0.0, 4.0]

        """
        gradients = gradient_matrix(A)
        gates = gradients.shape[1]
        units = np.arange(gates) if owners is None else np.asarray(owners, dtype=np.intp)
        H = second_moment(gradients)
        damping = ridge * H.diagonal().mean()
        if units.shape != (gates,) or not damping > 0:
            raise InputError(
                f"expected a unit for each of {gates} gates, a ridge > 0 and gradients that are not all 0, got "
                f"{len(units)} units and ridge {ridge:g}"
            )
        return RepairedFisher(np.linalg.inv(H + damping * np.eye(gates)), units)

    def energies(self, removals: Iterable[Iterable[int]]) -> list[float]:
        """E of sets of units, nats where A is; the empty set has 0."""
        return [self._energy(self._gates(removed)) for removed in removals]

    def gains(self, removed: Iterable[int]) -> Float64[np.ndarray, " gates"]:
        """The gates α [gates] that make up for a removal: 0 of what is removed, near 1 of what is kept."""
        gone = self._gates(removed)
        # (H⁻¹)_KR ((H⁻¹)_RR)⁻¹ = −H_KK⁻¹ H_KR, by the formula for the inverse in blocks.
        return 1 - self.inverse[:, gone] @ np.linalg.solve(self.inverse[np.ix_(gone, gone)], np.ones(len(gone)))

    def _gates(self, removed: Iterable[int]) -> np.ndarray:
        return np.flatnonzero(np.isin(self.owners, list(removed)))

    def _energy(self, gone: np.ndarray) -> float:
        return float(np.linalg.solve(self.inverse[np.ix_(gone, gone)], np.ones(len(gone))).sum())
