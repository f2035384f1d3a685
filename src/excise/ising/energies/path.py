"""An energy from gradients between intact and removed: every sample at a random point of its own.

At gates α = 1 − y the gradient of a quadratic damage hᵀy + yᵀJy + dᵀy² is ∂L/∂y = h + 2 d∘y + 2Jy, so one sample gives
one equation for every unit. Sample s sits at y = t·x with x a random subset of about M units and t between 0 and 1: the
region through which removal jumps, where the paper's expansion at y = 0 knows nothing. The cost is that of its one
gradient pass.

Each unit's equations are solved by ridge regression with Huber's weights, since gradients have heavy tails, in the
first blocks above all; the two estimates of each coupling are averaged. Ours; no paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import InputError
from excise.ising.energies.energy import Energy

Floats = NDArray[np.float64]

# The usual constant: 95 % efficiency where errors are normal after all.
HUBER = 1.345
ITERATIONS = 20
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def path_positions(units: int, samples: int, budgets: Sequence[int], seed: int) -> Floats:
    """Points y = t·x [samples, units], one a sample: t stratified in (0, 1), Σx within one or two of a budget.

    Args:
        units: N.
        samples: m.
        budgets: numbers of units that will be removed; each sample is drawn near one of them.
        seed: of the draw.

    """
    generator = np.random.default_rng(seed)
    # Stratified: drawn independently, few samples would leave gaps on the way.
    depths = (generator.permutation(samples) + generator.random(samples)) / samples
    positions = np.zeros((samples, units))
    for row, depth in zip(positions, depths, strict=True):
        size = int(np.clip(generator.choice(budgets) + generator.integers(-2, 3), 1, units))
        row[generator.choice(units, size, replace=False)] = depth
    return positions


def path(A: ArrayLike, positions: ArrayLike, labels: Sequence[str] = ()) -> Energy:
    """Predicted damage in nats, from gradients taken at random points between intact and removed.

    Args:
        A: [m samples, N units], gradient of each sample's loss with respect to the gates α, nats.
        positions: [m, N], where it was taken: y = 1 − α.
        labels: one name per unit.

    Raises:
        InputError: shapes differ or are not [m, N], or values are not finite.

    """
    gradients, at = np.asarray(A, dtype=np.float64), np.asarray(positions, dtype=np.float64)
    if gradients.ndim != 2 or gradients.shape != at.shape or gradients.size == 0:
        raise InputError(
            f"gradients and positions must both be [samples, units], got shapes {gradients.shape} and {at.shape}"
        )
    if not (np.isfinite(gradients).all() and np.isfinite(at).all()):
        raise InputError("gradients and positions must be finite; drop the samples that are not")
    m, n = gradients.shape
    ridge = _choose_ridge(-gradients, at)
    rows = np.array([_robust_ridge(-gradients[:, i], at, ridge) for i in range(n)])  # [N, 1 + N]
    slopes = rows[:, 1:] / 2
    h, J = rows[:, 0] + np.diag(slopes), (slopes + slopes.T) / 2
    np.fill_diagonal(J, 0.0)
    return Energy(h, J, labels, {"kind": "path", "samples": m, "ridge": ridge})


def _choose_ridge(targets: Floats, at: Floats) -> float:
    """The strength that predicts best the equations of samples left out (five folds, absolute error)."""
    fold = np.arange(len(at)) % 5
    errors = []
    for ridge in RIDGES:
        error = 0.0
        for k in range(5):
            inside, outside = fold != k, fold == k
            if not (inside.any() and outside.any()):
                continue
            for i in range(targets.shape[1]):
                weights = _robust_ridge(targets[inside, i], at[inside], ridge)
                error += np.abs(targets[outside, i] - weights[0] - at[outside] @ weights[1:]).sum()
        errors.append(error)
    return RIDGES[int(np.argmin(errors))]


def _robust_ridge(target: Floats, at: Floats, ridge: float) -> Floats:
    """Intercept and slopes [1 + N]: Huber loss, a ridge on the slopes in units of their variables' mean square."""
    design = np.hstack([np.ones((len(at), 1)), at])
    # The intercept is not pulled to 0 as slopes are; a trace of a penalty keeps the matrix regular.
    penalty = ridge * len(at) * np.append(1e-9, np.maximum((at**2).mean(axis=0), 1e-12))
    weights = np.ones(len(at))
    solution = np.zeros(design.shape[1])
    for _ in range(ITERATIONS):
        weighted = design * weights[:, None]
        new = np.linalg.solve(weighted.T @ design + np.diag(penalty), weighted.T @ target)
        residual = target - design @ new
        # The factor makes a median absolute deviation the standard deviation of normal errors.
        scale = 1.4826 * np.median(np.abs(residual)) + 1e-12
        weights = np.minimum(1.0, HUBER * scale / np.maximum(np.abs(residual), 1e-300))
        done = np.allclose(new, solution, rtol=1e-6, atol=1e-9)
        solution = new
        if done:
            break
    return np.asarray(solution, dtype=np.float64)
