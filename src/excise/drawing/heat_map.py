"""A matrix as colours on a diverging scale: blue below 0, red above."""

from __future__ import annotations

import itertools

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

# Odd, so that 0 is in the middle of a step of its own.
LEVELS = 65

# Evenly spaced stops; between them colours are mixed linearly. RdBu of ColorBrewer, reversed.
STOPS = ("#053061", "#2a71b2", "#6bacd1", "#c2ddec", "#f7f6f6", "#fbccb4", "#e48066", "#ba2832", "#67001f")


def colour(share: float) -> str:
    """The colour at a share of the way from the lowest value to the highest.

    Examples:
        >>> colour(0.0), colour(0.0625)
        ('#053061', '#18508a')

    """
    channels = np.array([[int(stop[k : k + 2], 16) for k in (1, 3, 5)] for stop in STOPS])
    places = np.linspace(0, 1, len(STOPS))
    return "#" + "".join(f"{round(float(np.interp(share, places, channel))):02x}" for channel in channels.T)


def heat_map(matrix: ArrayLike, limit: float, width: float, height: float) -> Markup:
    """Cells of a matrix, coloured by value in 65 steps: one path a colour, so that vector editors stay quick.

    Args:
        matrix: [rows, columns], finite.
        limit: value of the last colour, its negative that of the first; what is beyond has that colour too.
        width: of the whole, pixels.
        height: likewise.

    """
    values = np.asarray(matrix, dtype=np.float64)
    levels = np.rint((np.clip(values / limit, -1, 1) + 1) / 2 * (LEVELS - 1)).astype(int)
    outlines: dict[int, list[str]] = {}
    for i, row in enumerate(levels):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for start, end in itertools.pairwise(starts):
            outlines.setdefault(int(row[start]), []).append(f"M{start} {i}h{end - start}v1h-{end - start}z")
    paths = (
        Markup('<path fill="{}" d="{}"/>').format(colour(level / (LEVELS - 1)), "".join(outlines[level]))
        for level in sorted(outlines)
    )
    # Crisp edges: else the page shines through between cells.
    return Markup('<g transform="scale({:.6g} {:.6g})" shape-rendering="crispEdges">{}</g>').format(
        width / values.shape[1], height / values.shape[0], Markup("").join(paths)
    )
