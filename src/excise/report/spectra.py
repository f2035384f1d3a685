"""Tables and curves of spectra. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rich.table import Table

from excise.drawing.axes import axis, number, plane
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.svg import line, marker, polyline
from excise.ising.energies import Energy
from excise.ising.spectrum import Spectrum
from excise.text import ranges

GROUND, BOUND = Entry("ground state", "ours", 0), Entry("proved lower bound", "rival", 3)


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
    """One row per budget: ground state, its energy, the last listed energy, what was proved."""
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


def budget_chart(spectra: Mapping[int, Spectrum]) -> Chart:
    """Ground-state energy against the budget, the proved lower bound below it where a gap is left.

    Args:
        spectra: by budget, each with at least one state.

    """
    ground = {m: spectrum[0].energy for m, spectrum in spectra.items()}
    open_bounds = {m: s.lower_bound for m, s in spectra.items() if s.lower_bound is not None and not s.certified}

    def draw(width: int) -> Drawing:
        values = [*ground.values(), *open_bounds.values()]
        on = plane(
            width, partial(axis, list(ground)), partial(axis, values), "units removed, M", "energy", integers=True
        )
        on.parts.append(polyline([(on.x(m), on.y(energy)) for m, energy in ground.items()], GROUND.colour))
        for m, bound in open_bounds.items():
            on.parts.append(line(on.x(m), on.y(bound), on.x(m), on.y(ground[m]), f"error stroke-{BOUND.colour}"))
        for found, (name, colour, shape) in ((open_bounds, BOUND), (ground, GROUND)):
            for m, energy in found.items():
                on.parts.append(
                    marker(on.x(m), on.y(energy), colour, f"{name}, M = {m}: {number(energy)}", shape=shape)
                )
        return Drawing(on.height, on.parts)

    certified = sum(spectrum.certified for spectrum in spectra.values())
    return Chart(
        "Energy of the ground state against the number of removed units",
        draw,
        (GROUND, BOUND) if open_bounds else (GROUND,),
        f"{certified} of {len(spectra)} certified.",
    )
