"""Charts of several panels: side by side where there is room, and a closer look at values that lie crowded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from excise.drawing.axes import NARROW
from excise.drawing.chart import Drawing
from excise.drawing.svg import moved

# Of the whole range: below it points of five pixels' radius cover one another.
CROWDED = 0.2


def beside(width: int, panels: Sequence[Callable[[int], Drawing]]) -> Drawing:
    """Panels side by side, on a narrow screen one below the other.

    Args:
        width: of all, pixels.
        panels: each from its width to what is drawn.

    """
    across = 1 if width <= NARROW else len(panels)
    drawn = [panel(width // across) for panel in panels]
    tall = max(each.height for each in drawn)
    parts = [
        moved(place % across * (width / across), place // across * tall, each.parts) for place, each in enumerate(drawn)
    ]
    return Drawing(tall * math.ceil(len(drawn) / across), parts)


def crowded(values: Sequence[float]) -> float | None:
    """The largest of the lower half, where that half lies in less than a fifth of the whole range; else None.

    Examples:
        >>> crowded([0.1, 0.11, 0.12, 0.2, 3.0, 4.0]), crowded([1.0, 2.0, 3.0, 4.0])
        (0.12, None)

    """
    ordered = sorted(values)
    half = math.ceil(len(ordered) / 2)
    # Two points are told apart by any scale.
    if half < 3:
        return None
    bound = ordered[half - 1]
    return bound if bound - ordered[0] < CROWDED * (ordered[-1] - ordered[0]) else None
