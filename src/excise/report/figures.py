"""The page's charts as files: of a run that ends, and of everything a folder holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from excise.drawing.chart import Chart, write_charts
from excise.ising.energies import Energy
from excise.ising.spectrum import Spectrum
from excise.report.material import Material, measured_removals
from excise.report.sections import SECTIONS, couplings, prediction, removal

if TYPE_CHECKING:
    from excise.choosing.verify import Candidate, Verified


def write_figures(
    folder: str | Path, energy: Energy, spectrum: Spectrum, verified: Verified, chosen: Candidate
) -> dict[str, str]:
    """Draw a run: the couplings, the removal frequency, and measured damage against energy.

    Args:
        folder: for the SVG files.
        energy: over blocks.
        spectrum: lowest states of that energy.
        verified: measured candidates.
        chosen: the one that was removed.

    Returns:
        File of each figure, relative to the parent of `folder`.

    """
    name, budget = str(energy.source.get("kind", "energy")), len(chosen.removed)
    measured = measured_removals([asdict(candidate) for candidate in verified.candidates])[budget]
    damage = prediction.damage_chart(measured, chosen.removed, name, budget)
    charts: dict[str, Chart] = {
        couplings.FIGURE: couplings.couplings_chart(energy, name),
        f"{removal.FIGURE}-{budget}": removal.frequency_chart(spectrum, len(energy), chosen.removed, name),
        **({f"{prediction.FIGURE}-{budget}": damage} if damage else {}),
    }
    return write_charts(charts, folder)


def write_report_figures(material: Material) -> list[Path]:
    """Draw every chart of the page into the folder's `figures`.

    Args:
        material: from `excise.report.material.gather`.

    Returns:
        The SVG files.

    """
    charts = {name: chart for section in SECTIONS for name, chart in section.figures(material).items()}
    return [material.folder / place for place in write_charts(charts, material.folder / "figures").values()]
