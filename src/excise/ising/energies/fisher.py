"""Energies from per-sample gradients A: the paper's Hessian (Eq. 5–6), and the Taylor expansion with its linear term.

With gates α = 1 − x, Taylor gives L(α) − L(1) ≈ −∇L·x + ½ xᵀHx and H ≈ AᵀA/m. The paper drops the linear term and,
in Eq. 5, the ½; its Eq. 3 prints a minus before the gradient where Taylor has a plus (δα = −x then makes it −∇L·x).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import InputError
from excise.ising.energies.energy import Energy
from excise.plain import Facts


def fisher(A: ArrayLike, labels: Sequence[str] = ()) -> Energy:
    """The paper's energy xᵀHx with H = AᵀA/m (Jansen et al., Eq. 5–6); h = 0.

    Args:
        A: Per-sample gradients of the loss with respect to the gates, [m samples, N units], nats.
        labels: One name per unit.

    Raises:
        InputError: A is not a finite matrix with at least one row and column.

    >>> fisher([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [0.0, 0.0]]).J
    array([[2.   , 0.625],
           [0.625, 1.   ]])

    """
    gradients = gradient_matrix(A)
    return Energy(None, second_moment(gradients), labels, _source("fisher", gradients))


def fisher_linear(A: ArrayLike, labels: Sequence[str] = ()) -> Energy:
    """Predicted change of the loss in nats, −∇L·x + ½ xᵀHx: h = −mean(A), J = AᵀA/(2m).

    Args:
        A: Per-sample gradients of the loss with respect to the gates, [m samples, N units], nats.
        labels: One name per unit.

    Raises:
        InputError: A is not a finite matrix with at least one row and column.

    """
    gradients = gradient_matrix(A)
    return Energy(-gradients.mean(axis=0), second_moment(gradients) / 2, labels, _source("fisher+linear", gradients))


def second_moment(gradients: NDArray[np.float64]) -> NDArray[np.float64]:
    """AᵀA/m of gradients [m samples, units], symmetric to the last bit."""
    product = gradients.T @ gradients / len(gradients)
    # A BLAS need not give AᵀA symmetric to the last bit, and `Energy` would warn of what nobody did.
    return (product + product.T) / 2


def _source(kind: str, gradients: NDArray[np.float64]) -> Facts:
    m, n = gradients.shape
    rank = int(np.linalg.matrix_rank(gradients))
    if rank < n:
        warnings.warn(
            f"H has rank {rank} for {n} units ({m} samples): some removals cost no energy at all and the ranking among "
            f"them means nothing; use at least {4 * n} samples",
            stacklevel=3,
        )
    elif m < 4 * n:
        warnings.warn(
            f"{m} samples for {n} units: H is poorly determined and its lowest energies are too low; "
            f"use at least {4 * n} samples",
            stacklevel=3,
        )
    return {"kind": kind, "samples": m, "rank": rank}


def gradient_matrix(A: ArrayLike) -> NDArray[np.float64]:
    """Gradients as float64 [samples, units].

    Raises:
        InputError: A is not a finite matrix with at least one row and column.

    """
    gradients = np.asarray(A, dtype=np.float64)
    if gradients.ndim != 2 or gradients.size == 0:
        raise InputError(
            f"gradients A must be a matrix [samples, units] with at least one of each; got shape {gradients.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(gradients).all(axis=1))
    if len(bad):
        raise InputError(
            f"gradients A must be finite; {len(bad)} samples are not, the first is row {bad[0]}. Drop them first"
        )
    return gradients
