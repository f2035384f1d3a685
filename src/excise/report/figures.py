"""Figures of a run, as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from excise.artefacts import atomic_path
from excise.ising.energies import Energy
from excise.ising.spectrum import Spectrum

if TYPE_CHECKING:
    from excise.choosing.verify import Candidate, Verified

LOWEST = 20
OURS, LIGHTER, CHOSEN = "#1f5fa8", "#79a9dc", "#1d8348"
COLOURS = {
    "refined states": "#1d8348",
    "fitted states": "#7dcea0",
    "fisher states": OURS,
    "rival criteria": "#c4572b",
    "random": "#8a8a8a",
}


def write_figures(
    folder: str | Path, energy: Energy, spectrum: Spectrum, verified: Verified, chosen: Candidate
) -> dict[str, str]:
    """Draw the couplings, the removal frequency and energy against measured loss.

    Args:
        folder: for the PNG files.
        energy: over blocks.
        spectrum: lowest states of that energy.
        verified: measured candidates.
        chosen: the one that was removed.

    Returns:
        File name of each figure, relative to the parent of `folder`.

    """
    folder = Path(folder)
    figures = {
        "couplings": couplings(energy),
        "removal_frequency": removal_frequency(spectrum, chosen),
        "energy_and_loss": energy_and_loss(energy, verified, chosen),
    }
    names = {}
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
        names[name] = f"{folder.name}/{name}.png"
    return names


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, atomically; the suffix names the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")


def couplings(energy: Energy) -> Figure:
    """Heat maps of |J| (logarithmic) and of its correlations J_ij / √(J_ii J_jj)."""
    figure = Figure(figsize=(11, 4.8))
    left, right = figure.subplots(1, 2)
    magnitude = np.abs(energy.J)
    floor = magnitude[magnitude > 0].min(initial=1.0) if magnitude.any() else 1.0
    image = left.imshow(np.log10(np.maximum(magnitude, floor)), cmap="viridis")
    figure.colorbar(image, ax=left, shrink=0.8, label="log₁₀ |J|")
    left.set_title(f"Couplings ({energy.source.get('kind', 'energy')})")
    image = right.imshow(energy.correlation(), cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=right, shrink=0.8, label="correlation")
    right.set_title("Correlation of the gates")
    for axes in (left, right):
        axes.set_xlabel("block")
        axes.set_ylabel("block")
    return figure


def removal_frequency(spectrum: Spectrum, chosen: Candidate) -> Figure:
    """How often each block is removed among the lowest states (the paper's Fig. 3); the chosen removal is marked."""
    lowest = min(LOWEST, len(spectrum))
    counts = spectrum.removal_frequency(lowest) * lowest
    figure = Figure(figsize=(max(6.0, 0.22 * len(counts)), 3.4))
    axes = figure.subplots()
    axes.bar(np.arange(len(counts)), counts, color=OURS)
    axes.plot(chosen.removed, [-0.06 * lowest] * len(chosen.removed), "^", color=CHOSEN, clip_on=False, label="removed")
    axes.set_xlabel("block")
    axes.set_ylabel("states")
    proved = "proved" if spectrum.certified else "not proved"
    axes.set_title(f"Removals among the {lowest} lowest states ({spectrum.solver}, {proved})")
    axes.set_ylim(-0.12 * lowest, lowest * 1.05)
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def energy_and_loss(energy: Energy, verified: Verified, chosen: Candidate) -> Figure:
    """Measured loss of every candidate against its energy, with Spearman's rank correlation."""
    figure = Figure(figsize=(6.4, 4.4))
    axes = figure.subplots()
    groups = sorted({_group(c) for c in verified.candidates})
    for group in groups:
        colour = COLOURS.get(group, LIGHTER)
        points = [c for c in verified.candidates if _group(c) == group and math.isfinite(c.loss)]
        axes.scatter([c.energy for c in points], [c.delta for c in points], color=colour, label=group, s=28, alpha=0.85)
    axes.scatter(
        [chosen.energy], [chosen.delta], s=150, facecolors="none", edgecolors=CHOSEN, linewidths=2, label="removed"
    )
    rho = "n/a" if verified.spearman is None else f"{verified.spearman:.2f}"
    axes.set_title(f"Energy against measured damage (Spearman ρ = {rho})")
    axes.set_xlabel(f"energy ({energy.source.get('kind', 'energy')})")
    axes.set_ylabel("Δ loss on held-out samples (nats/token)")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xscale("symlog", linthresh=max(1e-9, float(np.median([abs(c.energy) for c in verified.candidates]))))
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def _group(candidate: Candidate) -> str:
    if candidate.method.startswith("random"):
        return "random"
    energy, colon, _ = candidate.method.partition(":")
    return f"{energy} states" if colon else "rival criteria"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
