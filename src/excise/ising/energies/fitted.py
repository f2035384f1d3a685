"""An energy fitted to any measured removals: Bayesian linear regression on x_i and x_i x_j around a prior energy.

The damage of a removal x is modelled as

    d(x) = (1 + β) E₀(x) + γ |x| (|x| − 1) / 2 + uᵀx + Σ_{i<j} v_ij x_i x_j + noise,

with E₀ the prior energy and independent normal β, γ, u, v. Noise is each measurement's own, and a part that all
measurements on the same samples have in common. Everything is quadratic in x, so the posterior mean is again
an energy (h, J), and every exact solver applies. β and γ let a few measurements correct the scale of the prior and the
mean coupling, in which cheap priors are most wrong. The regression is done in its dual form: with n = |x ∩ x'| the
kernel of the u and v terms is σ_u² n + σ_v² n (n − 1) / 2, so the cost is that of one n × n solve for n measurements,
however many pairs of units there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from excise.errors import InputError
from excise.ising.energies.energy import Energy
from excise.ising.spectrum import masks_of

Removal = tuple[int, ...]
Floats = NDArray[np.float64]

# Wide: cheap priors are most wrong in their scale and mean coupling, which a few measurements settle.
SCALE_SD, COUPLING_SD = 0.5, 0.1
# Grid of (σ_u, σ_v) in units of the spread of the damages, from which the marginal likelihood chooses.
SPREADS = tuple(itertools.product((0.03, 0.1, 0.3), (0.01, 0.03, 0.1)))


@dataclass(frozen=True, eq=False)
class Noise:
    """Of measurements.

    Attributes:
        own: standard deviation of what is each measurement's own, nats; for all, or each.
        common: of how a group differs from the mean group: a normal number times this, nats; nothing without.
        groups: the group of each measurement, such as the samples it was made on.

    """

    own: Mapping[Removal, float] | float
    common: Mapping[Removal, float] = field(default_factory=dict)
    groups: Mapping[Removal, int] = field(default_factory=dict)

    def sds(self, removals: Sequence[Removal]) -> Float64[np.ndarray, " removals"]:
        """Standard deviations of the own parts [removals]."""
        own = self.own
        return np.array([own[r] if isinstance(own, Mapping) else own for r in removals], np.float64)

    def loadings(self, removals: Sequence[Removal]) -> Float64[np.ndarray, "removals groups"]:
        """What one standard deviation of each group's common part adds to measurements [removals, groups]."""
        groups = sorted({self.groups[r] for r in removals if r in self.common})
        if not groups:
            return np.zeros((len(removals), 0))
        sizes = np.array([self.common.get(r, 0.0) for r in removals])
        member = np.array([[self.groups.get(r) == g for g in groups] for r in removals])
        # Less the mean of all groups, which is what the energy is of: a single group adds nothing.
        return sizes[:, None] * (member - 1 / len(groups))


@dataclass(frozen=True, eq=False)
class Fitted:
    """Posterior over energies.

    Attributes:
        prior: E₀.
        masks: [n, N], which units each measured removal removes, as 0 and 1.
        damages: [n], measured, nats.
        noise: [n], standard deviation of each measurement's own noise, nats.
        common: [n, groups], what a standard deviation of the noise that a group shares adds to each, nats.
        linear_sd: σ_u, prior standard deviation of what each unit adds to E₀, nats.
        pair_sd: σ_v, of what each pair adds, nats.

    """

    prior: Energy
    masks: Float64[np.ndarray, "n N"]
    damages: Float64[np.ndarray, " n"]
    noise: Float64[np.ndarray, " n"]
    common: Float64[np.ndarray, "n groups"]
    linear_sd: float
    pair_sd: float

    def energy(self) -> Energy:
        """Posterior mean as an energy (h, J), in nats."""
        return self._energy(self._dual(self.damages - self._prior_mean(self.masks)))

    def corrected(self) -> Float64[np.ndarray, " n"]:
        """The measured damages [n] as if all were of a mean group, nats: less what those of one have in common."""
        shared = self.common.T @ self._dual(self.damages - self._prior_mean(self.masks))
        return self.damages - self.common @ shared

    def sd(self, removals: Sequence[Removal]) -> Float64[np.ndarray, " removals"]:
        """Posterior standard deviation of the damage of removals [removals], nats, without measurement noise."""
        masks = masks_of(removals, len(self.prior)).astype(np.float64)
        cross = self._kernel(masks, self.masks)
        variance = np.array([self._kernel(m[None], m[None])[0, 0] for m in masks])
        variance -= np.einsum("ij,ji->i", cross, cho_solve(self._factor, cross.T))
        # Rounding may take the variance of what was measured below 0.
        return np.sqrt(np.maximum(variance, 0.0))

    def most_telling(self, removals: Sequence[Removal], count: int) -> list[Removal]:
        """The removals whose measurements would tell most about all of `removals`.

        One after the other, each the one that lowers the sum of their posterior variances most, given those before it
        (Cohn's criterion of active learning: Cohn, Ghahramani and Jordan, JAIR 4, 1996). What will be measured does not
        matter to a variance, so nothing is measured in between.

        Args:
            removals: [n] distinct; takes memory and time of n² numbers.
            count: how many are wanted; fewer are returned where there are no more.

        """
        masks = masks_of(removals, len(self.prior)).astype(np.float64)
        cross = self._kernel(masks, self.masks)
        covariance = self._kernel(masks, masks) - cross @ cho_solve(self._factor, cross.T)
        # That of a measurement yet to come, as of those made.
        noise, left, told = float(np.median(self.noise)) ** 2, np.ones(len(removals), bool), []
        for _ in range(min(count, len(removals))):
            variance = np.maximum(np.diag(covariance), 0.0) + noise
            gains = np.where(left, np.square(covariance).sum(axis=0) / variance, -np.inf)
            best = int(np.argmax(gains))
            covariance = covariance - np.outer(covariance[:, best], covariance[best]) / variance[best]
            left[best] = False
            told.append(removals[best])
        return told

    def log_likelihood(self) -> float:
        """Log marginal likelihood of the measurements."""
        return _log_likelihood(self.damages - self._prior_mean(self.masks), self._factor)

    def leave_one_out(self) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Prediction of each measurement from all others, and its standard deviation, noise included, [n] each."""
        # In closed form from one inverse (Rasmussen and Williams, 2006, Eq. 5.12), not from n fits.
        inverse = cho_solve(self._factor, np.eye(len(self.damages)))
        residual = self.damages - self._prior_mean(self.masks)
        variance = 1 / np.diag(inverse)
        return self.damages - (inverse @ residual) * variance, np.sqrt(variance)

    def _prior_mean(self, masks: Floats) -> Floats:
        return _values(self.prior, masks)

    def _kernel(self, a: Floats, b: Floats) -> Floats:
        overlap = a @ b.T
        size_a, size_b = a.sum(axis=1), b.sum(axis=1)
        count_a, count_b = size_a * (size_a - 1) / 2, size_b * (size_b - 1) / 2
        return (
            self.linear_sd**2 * overlap
            + self.pair_sd**2 * overlap * (overlap - 1) / 2
            + SCALE_SD**2 * np.outer(self._prior_mean(a), self._prior_mean(b))
            + COUPLING_SD**2 * np.outer(count_a, count_b)
        )

    @cached_property
    def _factor(self) -> tuple[Floats, bool]:
        noise = np.diag(self.noise**2) + self.common @ self.common.T
        return cho_factor(self._kernel(self.masks, self.masks) + noise, lower=True)

    def _dual(self, residual: Floats) -> Floats:
        return cho_solve(self._factor, residual)

    def _energy(self, dual: Floats) -> Energy:
        """Energy whose values are E₀ + Σ_n dual_n k(x, x_n)."""
        size = self.masks.sum(axis=1)
        beta = SCALE_SD**2 * float(dual @ self._prior_mean(self.masks))
        gamma = COUPLING_SD**2 * float(dual @ (size * (size - 1) / 2))
        h = self.linear_sd**2 * (dual @ self.masks)
        J = (self.pair_sd**2 * (self.masks.T * dual) @ self.masks + gamma) / 2
        # Pairs of a unit with itself are no pairs; what a unit does alone is in h.
        np.fill_diagonal(J, 0.0)
        J = (J + J.T) / 2
        source = {"kind": "fitted", "prior": self.prior.source.get("kind"), "measurements": len(self.damages)}
        return Energy((1 + beta) * self.prior.h + h, (1 + beta) * self.prior.J + J, self.prior.labels, source)


def fit(
    prior: Energy,
    damages: Mapping[Removal, float],
    noise: Mapping[Removal, float] | float,
    *,
    spreads: Sequence[tuple[float, float]] = SPREADS,
) -> Fitted:
    """Fit an energy to measured damages.

    Args:
        prior: E₀, in nats; one without any content (all zero) is allowed.
        damages: removal → measured damage, nats. Not finite ones (the model overflowed) are left out.
        noise: standard deviation of the measurements, nats; for all, or each.
        spreads: pairs (σ_u, σ_v) in units of the damages' median, of which the one with the largest marginal likelihood
            is taken.

    Raises:
        InputError: no measurement is finite, or a standard deviation is not above 0.

    """
    return likeliest(prior, damages, [Noise(noise)], spreads=spreads)


def likeliest(
    prior: Energy,
    damages: Mapping[Removal, float],
    noises: Sequence[Noise],
    *,
    spreads: Sequence[tuple[float, float]] = SPREADS,
) -> Fitted:
    """The fit of the largest marginal likelihood where the noise is not certain either; see `fit`."""
    kept = [removed for removed, damage in damages.items() if np.isfinite(damage)]
    if not kept:
        raise InputError("an energy is fitted to measured damages, and none that is finite was given")
    values = np.array([damages[removed] for removed in kept])
    parts = [(noise.sds(kept), noise.loadings(kept)) for noise in noises]
    if not all((sds > 0).all() for sds, _ in parts):
        raise InputError("the noise of a measurement must be above 0 nats")
    # The median: a few removals of 15 nats must not set the scale for all.
    unit = max(float(np.median(np.abs(values))), 1e-12)
    start = Fitted(prior, masks_of(kept, len(prior)).astype(np.float64), values, *parts[0], 0.0, 0.0)
    # The kernel is linear in the squares of its spreads: its parts are worked out once, not for every candidate.
    fixed = start._kernel(start.masks, start.masks)
    linear = replace(start, linear_sd=1.0)._kernel(start.masks, start.masks) - fixed
    pair = replace(start, pair_sd=1.0)._kernel(start.masks, start.masks) - fixed
    residual = values - start._prior_mean(start.masks)

    def likelihood(candidate: tuple[tuple[Floats, Floats], tuple[float, float]]) -> float:
        (own, common), (u, v) = candidate
        kernel = fixed + (u * unit) ** 2 * linear + (v * unit) ** 2 * pair + np.diag(own**2) + common @ common.T
        return _log_likelihood(residual, cho_factor(kernel, lower=True))

    (own, common), (u, v) = max(itertools.product(parts, spreads), key=likelihood)
    return replace(start, noise=own, common=common, linear_sd=u * unit, pair_sd=v * unit)


def _log_likelihood(residual: Floats, factor: tuple[Floats, bool]) -> float:
    log_determinant = 2 * np.log(np.diag(factor[0])).sum()
    return float(-0.5 * (residual @ cho_solve(factor, residual) + log_determinant + len(residual) * np.log(2 * np.pi)))


def _values(energy: Energy, masks: Floats) -> Floats:
    return masks @ energy.h + np.einsum("ni,ij,nj->n", masks, energy.J, masks, optimize=True)
