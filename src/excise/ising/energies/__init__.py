"""Energies (h, J) over removable units.

Those in `ENERGIES` are functions of gradients A [samples, units] of the intact model; `path`, `pairs` and `fitted`
stand in files of their own, as they take something else: gradients at other points, or measured damage.
"""

from excise.ising.energies.energy import Energy
from excise.ising.energies.fisher import fisher, fisher_linear

ENERGIES = {
    "fisher": fisher,
    "fisher+linear": fisher_linear,
}

__all__ = ["ENERGIES", "Energy", "fisher", "fisher_linear"]
