"""Energies of gradients, and their lowest states as proposals."""

from __future__ import annotations

import warnings

from excise.choosing.proposal import Proposal
from excise.ising.energies import ENERGIES, Energy
from excise.ising.gradients import Gradients
from excise.ising.spectrum import Spectrum


def block_energies(gradients: Gradients) -> dict[str, Energy]:
    """Every energy that follows from gradients, over blocks; a warning they share is given once."""
    columns = gradients.blocks()
    # Energies share their gradients, so too few samples would be said once for each of them.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        energies = {name: build(columns) for name, build in ENERGIES.items()}
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(message, stacklevel=2)
    return energies


def lowest_states(name: str, spectrum: Spectrum, count: int, min_distance: int) -> list[Proposal]:
    """The lowest states of a spectrum at that distance from one another, as proposals of `name:k`."""
    apart = spectrum.select(count, min_distance=min_distance)
    return [Proposal(f"{name}:{spectrum.states.index(state)}", state.removed) for state in apart]
