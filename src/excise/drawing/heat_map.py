"""A matrix as colours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

LEVELS = 64

# Evenly spaced stops of a scale; between them colours are mixed linearly. Both are of Matplotlib's maps (viridis by
# Smith and van der Walt; RdBu of ColorBrewer, reversed).
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
RED_BLUE = ("#053061", "#2a71b2", "#6bacd1", "#c2ddec", "#f7f6f6", "#fbccb4", "#e48066", "#ba2832", "#67001f")


def colour(stops: Sequence[str], share: float) -> str:
    """The colour at a share of the way from the first stop to the last.

    Examples:
        >>> colour(("#000000", "#ff8000"), 0.5)
        '#804000'

    """
    channels = np.array([[int(stop[k : k + 2], 16) for k in (1, 3, 5)] for stop in stops])
    places = np.linspace(0, 1, len(stops))
    return "#" + "".join(f"{round(float(np.interp(share, places, channel))):02x}" for channel in channels.T)


def heat_map(matrix: ArrayLike, stops: Sequence[str], low: float, high: float, width: float, height: float) -> Markup:
    """Cells of a matrix, coloured by value in 64 steps: one path a colour, so that vector editors stay quick.

    Args:
        matrix: [rows, columns], finite.
        stops: of the colour scale.
        low: value of the first stop; what is lower has its colour.
        high: value of the last stop, likewise.
        width: of the whole, pixels.
        height: likewise.

    """
    values = np.asarray(matrix, dtype=np.float64)
    levels = np.rint(np.clip((values - low) / (high - low), 0, 1) * (LEVELS - 1)).astype(int)
    outlines: dict[int, list[str]] = {}
    for i, row in enumerate(levels):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for start, end in itertools.pairwise(starts):
            outlines.setdefault(int(row[start]), []).append(f"M{start} {i}h{end - start}v1h-{end - start}z")
    paths = (
        Markup('<path fill="{}" d="{}"/>').format(colour(stops, level / (LEVELS - 1)), "".join(outlines[level]))
        for level in sorted(outlines)
    )
    # Crisp edges: else the page shines through between cells.
    return Markup('<g transform="scale({:.6g} {:.6g})" shape-rendering="crispEdges">{}</g>').format(
        width / values.shape[1], height / values.shape[0], Markup("").join(paths)
    )
