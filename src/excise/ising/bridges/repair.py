"""From any 0/1 vector to a state that removes the right number of units, by energy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from excise.ising.problem import Reduced


def marginals(reduced: Reduced, x: NDArray[np.int8]) -> NDArray[np.float64]:
    """c_i = h_i + J_ii + 2 Σ_{j≠i} J_ij x_j: what removing unit i adds to the energy, [n]."""
    diagonal = np.diag(reduced.J)
    return reduced.h + diagonal + 2 * (reduced.J @ x - diagonal * x)


def to_count(reduced: Reduced, x: NDArray[np.int8]) -> NDArray[np.int8]:
    """Flip one entry at a time, the one that leaves the lowest energy, until Σx is the count; x itself is kept.

    Args:
        reduced: A problem without its fixed units.
        x: Any 0/1 vector over the free units, [n].

    """
    x = x.copy()
    while x.sum() != reduced.count:
        c = marginals(reduced, x)
        if x.sum() > reduced.count:
            x[np.where(x == 1, c, -np.inf).argmax()] = 0
        else:
            x[np.where(x == 0, c, np.inf).argmin()] = 1
    return x
