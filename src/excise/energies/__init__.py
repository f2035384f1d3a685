"""Energies (h, J) over removable units, by name. An entry takes gradients A [samples, units] and labels."""

from excise.energies.energy import Energy
from excise.energies.fisher import fisher, fisher_linear

ENERGIES = {
    "fisher": fisher,
    "fisher+linear": fisher_linear,
}

__all__ = ["ENERGIES", "Energy", "fisher", "fisher_linear"]
