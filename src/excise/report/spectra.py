"""Tables and curves of spectra. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from excise.ising.energies import Energy
from excise.ising.spectrum import Spectrum
from excise.text import ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spectrum_table(spectrum: Spectrum, energy: Energy) -> Table:
    """The states of a spectrum, lowest first."""
    table = Table("state", "energy", "removed", title=certificate(spectrum))
    for k, state in enumerate(spectrum):
        names = [energy.labels[i] for i in state.removed]
        numbered = all(name == str(i) for i, name in zip(state.removed, names, strict=True))
        table.add_row(str(k), f"{state.energy:.6g}", ranges(state.removed) if numbered else ", ".join(names))
    return table


def certificate(spectrum: Spectrum) -> str:
    """One line on what was proved."""
    if spectrum.certified:
        return f"certified: the {len(spectrum)} lowest states ({spectrum.solver}, {spectrum.seconds:.2f} s)"
    if spectrum.gap is not None:
        return f"not certified: gap {spectrum.gap:.1%} ({spectrum.solver}, {spectrum.seconds:.2f} s)"
    return f"not certified: best states found by {spectrum.solver} ({spectrum.seconds:.2f} s)"


def frequency_line(spectrum: Spectrum, energy: Energy) -> str:
    """How many of the listed states remove each unit, the most often removed first (paper, Fig. 3)."""
    counts = (spectrum.removal_frequency() * len(spectrum)).round().astype(int)
    order = sorted((i for i in range(len(counts)) if counts[i]), key=lambda i: (-counts[i], i))
    return f"removed in (of {len(spectrum)} states): " + ", ".join(f"{energy.labels[i]}: {counts[i]}" for i in order)


def budgets_table(spectra: Mapping[int, Spectrum]) -> Table:
    """One row a budget: ground state, its energy, the last listed energy, what was proved."""
    table = Table("M", "ground state", "last state", "removed", "certified", "gap", "states", "seconds")
    for budget, spectrum in spectra.items():
        gap = "" if spectrum.gap is None else f"{spectrum.gap:.1%}"
        table.add_row(
            str(budget),
            f"{spectrum[0].energy:.6g}",
            f"{spectrum[-1].energy:.6g}",
            ranges(spectrum[0].removed),
            "yes" if spectrum.certified else "no",
            gap,
            str(len(spectrum)),
            f"{spectrum.seconds:.2f}",
        )
    return table


def budget_curve(spectra: Mapping[int, Spectrum]) -> Figure:
    """Ground-state energy against the budget, the certified lower bound below it where a gap is left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    budgets = list(spectra)
    ground = [spectra[m][0].energy for m in budgets]
    axes.plot(budgets, ground, "o-", color="#1f5fa8", label="ground state")
    bounded = [m for m in budgets if spectra[m].lower_bound is not None]
    bounds = [spectra[m].lower_bound or 0.0 for m in bounded]
    axes.plot(bounded, bounds, "_", color="#c4572b", markersize=12, label="proved lower bound")
    axes.set_xlabel("units removed, M")
    axes.set_ylabel("energy")
    certified = sum(spectrum.certified for spectrum in spectra.values())
    axes.set_title(f"Ground state against budget ({certified} of {len(spectra)} certified)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
