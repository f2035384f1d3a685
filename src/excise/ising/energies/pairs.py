"""An energy from measured damage: every single removal and every pair, exactly.

With x_i² = x_i, hᵢ = d({i}) and 2J_ij = d({i, j}) − d({i}) − d({j}) reproduce every measured single and pair; what
three and more blocks do to each other beyond their pairs is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from excise.errors import InputError
from excise.ising.energies.energy import Energy

Removal = tuple[int, ...]


def singles_and_pairs(units: Sequence[int]) -> list[Removal]:
    """The removals that `pairs` needs measured: each of `units` alone, and each two of them.

    Examples:
        >>> singles_and_pairs([0, 3])
        [(0,), (3,), (0, 3)]

    """
    return [(i,) for i in units] + list(itertools.combinations(sorted(units), 2))


def pairs(damages: Mapping[Removal, float], units: int, labels: Sequence[str] = ()) -> Energy:
    """Energy in nats that equals the measured damage of single and pair removals.

    Args:
        damages: removal → damage (loss less that of the intact model, or a divergence from it), nats. A unit without a
            single is left at 0 and must be protected; a pair that was not measured counts as the sum of its singles.
        units: N.
        labels: one name per unit.

    Raises:
        InputError: a damage is not finite, or a pair was measured without its singles.

    >>> energy = pairs({(0,): 1.0, (1,): 2.0, (0, 1): 2.5}, units=2)
    >>> energy.energy([0]), energy.energy([0, 1])
    (1.0, 2.5)

    """
    h, J = np.zeros(units), np.zeros((units, units))
    bad = [removed for removed, damage in damages.items() if not np.isfinite(damage)]
    if bad:
        raise InputError(
            f"{len(bad)} measured damages are not finite (first: blocks {list(bad[0])}); try --dtype float32"
        )
    for removed, damage in damages.items():
        if len(removed) == 1:
            h[removed[0]] = damage
    for removed, damage in damages.items():
        if len(removed) == 2:
            i, j = removed
            if (i,) not in damages or (j,) not in damages:
                raise InputError(f"the pair {i}, {j} was measured but not both of its blocks alone; measure those too")
            J[i, j] = J[j, i] = (damage - h[i] - h[j]) / 2
    measured = sum(len(removed) == 2 for removed in damages)
    return Energy(h, J, labels, {"kind": "pairs", "pairs": measured})
