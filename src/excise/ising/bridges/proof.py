"""What another program's bounds prove about a list of states."""

from __future__ import annotations

from dataclasses import replace

from excise.ising.spectrum import Spectrum

TIE = 1e-9


def with_pool_bound(spectrum: Spectrum, undiscovered: float, bound: float, exhausted: bool, states: int) -> Spectrum:
    """Add what a solution pool proved.

    Args:
        spectrum: The states found, nothing proved yet.
        undiscovered: No state outside the pool has a lower energy.
        bound: No state has a lower energy.
        exhausted: Whether the pool is known to hold every state.
        states: How many were asked for.

    """
    if exhausted:
        return replace(spectrum.with_proof(), complete=True)
    if not spectrum.states:
        return replace(spectrum, lower_bound=bound)
    tolerance = TIE * max(1e-3, abs(spectrum.states[-1].energy))
    proved = sum(1 for state in spectrum.states if state.energy <= undiscovered + tolerance)
    if proved == len(spectrum) == states:
        return spectrum.with_proof()
    lowest = spectrum.states[0].energy
    lower = lowest if proved else min(bound, lowest)
    short = f"the pool's bound is {undiscovered:.6g}: {proved} of {len(spectrum)} states are proved"
    return replace(
        spectrum,
        lower_bound=lower,
        gap=(lowest - lower) / abs(lowest) if lowest else 0.0 if lower == lowest else None,
        proved=proved,
        notes=(*spectrum.notes, short),
    )
