"""Figures of benchmarks and documentation: Matplotlib, in the colours of the report."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from excise.artefacts import atomic_path
from excise.drawing.style import COLOURS

LIGHT = {name: light for name, (light, _) in COLOURS.items()}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, atomically; the suffix names the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
