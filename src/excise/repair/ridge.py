"""Weighted least squares with a ridge, from sums that are gathered batch by batch in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# In half decades; the infinite one is no repair, so held-out samples may refuse it.
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, math.inf)


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """The sums that determine D in min Σₜ wₜ ‖φₜ D − rₜ‖² + ridge · s ‖D‖², with s the mean diagonal of ΦᵀWΦ.

    Attributes:
        gram: ΦᵀWΦ [features, features].
        cross: ΦᵀWR [features, width].
        square: Σₜ wₜ ‖rₜ‖², a scalar tensor.

    """

    gram: Float64[Tensor, "features features"]
    cross: Float64[Tensor, "features width"]
    square: Float64[Tensor, ""]

    @staticmethod
    def zeros(features: int, width: int, device: torch.device) -> NormalEquations:
        """Sums over no tokens."""
        options = {"dtype": torch.float64, "device": device}
        return NormalEquations(
            torch.zeros(features, features, **options),  # type: ignore[call-overload]
            torch.zeros(features, width, **options),  # type: ignore[call-overload]
            torch.zeros((), **options),  # type: ignore[call-overload]
        )

    def add(
        self,
        features: Float[Tensor, "tokens features"],
        residual: Float[Tensor, "tokens width"],
        weights: Float[Tensor, " tokens"],
    ) -> None:
        """Add tokens, in place.

        Args:
            features: Φ [tokens, features].
            residual: R [tokens, width].
            weights: w [tokens].

        """
        phi, rest, w = features.double(), residual.double(), weights.double().unsqueeze(1)
        weighted = phi * w
        self.gram.addmm_(weighted.T, phi)
        self.cross.addmm_(weighted.T, rest)
        self.square.add_((rest.square() * w).sum())

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Sums over the tokens of both."""
        return NormalEquations(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    @property
    def scale(self) -> float:
        """Mean diagonal s of ΦᵀWΦ, to which ridges are relative."""
        return float(self.gram.diagonal().mean())

    def solve(self, ridge: float) -> Float64[Tensor, "features width"]:
        """D [features, width] for a ridge > 0; zeros for an infinite one."""
        if math.isinf(ridge) or self.scale == 0:
            return torch.zeros_like(self.cross)
        damped = self.gram + ridge * self.scale * torch.eye(
            len(self.gram), dtype=torch.float64, device=self.gram.device
        )
        # Positive definite, since every ridge is above 0 and the diagonal's mean is too.
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(damped))

    def held_out_errors(self, held_out: NormalEquations, ridges: Sequence[float]) -> list[float]:
        """Error on held-out tokens of the D fitted on others, for each ridge, as a share of the error of D = 0.

        One eigendecomposition serves all ridges: with ΦᵀWΦ = QΛQᵀ, D = Q f(Λ) QᵀΦᵀWR and f = 1/(Λ + ridge·s), the error
        Σ w‖φD − r‖² is a quadratic form in f.
        """
        if held_out.square == 0:
            return [1.0] * len(ridges)
        values, vectors = torch.linalg.eigh(self.gram)
        cross = vectors.T @ self.cross
        quadratic = (vectors.T @ held_out.gram @ vectors) * (cross @ cross.T)
        linear = (cross * (vectors.T @ held_out.cross)).sum(dim=1)
        errors = []
        for ridge in ridges:
            if math.isinf(ridge) or self.scale == 0:
                errors.append(1.0)
                continue
            # Eigenvalues of a Gram matrix are not negative but for rounding.
            f = 1 / (values.clamp(min=0) + ridge * self.scale)
            errors.append(float((f @ quadratic @ f - 2 * f @ linear + held_out.square) / held_out.square))
        return errors


@dataclass(frozen=True, eq=False)
class GainEquations:
    """The sums that determine d in min Σₜ wₜ ‖φₜ ⊙ d − rₜ‖² + ridge · s ‖d‖², s the mean of Σₜ wₜ φₜ² over channels.

    Attributes:
        gram: Σₜ wₜ φₜ² [width].
        cross: Σₜ wₜ φₜ ⊙ rₜ [width].
        square: Σₜ wₜ ‖rₜ‖², a scalar tensor.

    """

    gram: Float64[Tensor, " width"]
    cross: Float64[Tensor, " width"]
    square: Float64[Tensor, ""]

    @staticmethod
    def zeros(width: int, device: torch.device) -> GainEquations:
        """Sums over no tokens."""
        gram, cross = torch.zeros(2, width, dtype=torch.float64, device=device)
        return GainEquations(gram, cross, torch.zeros((), dtype=torch.float64, device=device))

    def add(
        self,
        features: Float[Tensor, "tokens width"],
        residual: Float[Tensor, "tokens width"],
        weights: Float[Tensor, " tokens"],
    ) -> None:
        """Add tokens, in place; see `NormalEquations.add`."""
        phi, rest, w = features.double(), residual.double(), weights.double().unsqueeze(1)
        self.gram.add_((phi.square() * w).sum(dim=0))
        self.cross.add_((phi * rest * w).sum(dim=0))
        self.square.add_((rest.square() * w).sum())

    def __add__(self, other: GainEquations) -> GainEquations:
        """Sums over the tokens of both."""
        return GainEquations(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    @property
    def scale(self) -> float:
        """Mean s of Σₜ wₜ φₜ² over channels, to which ridges are relative."""
        return float(self.gram.mean())

    def solve(self, ridge: float) -> Float64[Tensor, " width"]:
        """The d [width] for a ridge > 0; zeros for an infinite one."""
        if math.isinf(ridge) or self.scale == 0:
            return torch.zeros_like(self.cross)
        return self.cross / (self.gram + ridge * self.scale)

    def held_out_errors(self, held_out: GainEquations, ridges: Sequence[float]) -> list[float]:
        """See `NormalEquations.held_out_errors`."""
        if held_out.square == 0:
            return [1.0] * len(ridges)
        solutions = [self.solve(ridge) for ridge in ridges]
        errors = [(d * d) @ held_out.gram - 2 * d @ held_out.cross + held_out.square for d in solutions]
        return [float(error / held_out.square) for error in errors]


Equations = NormalEquations | GainEquations
