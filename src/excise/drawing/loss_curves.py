"""Training loss by step: the figure of a healed model, and of several beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from excise.artefacts import as_number
from excise.drawing.axes import axis, number, plane
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.style import series
from excise.drawing.svg import polyline

# Of a curve as drawn, and about so many in the table behind it.
POINTS, ROWS = 200, 20
Points = list[tuple[float, float]]


def running_mean(curve: Sequence[Mapping[str, float]]) -> Points:
    """(step, loss) over a twentieth of the steps, at most 200 of them; none where no loss is finite.

    Args:
        curve: of heal.json: {"step", "loss", …} by step, losses in nats per token.

    """
    steps = _finite(curve)
    if not steps:
        return []
    window = max(1, len(steps) // 20)
    means = np.convolve([loss for _, loss in steps], np.ones(window) / window, mode="valid").tolist()
    return _thinned(list(zip([step for step, _ in steps[window - 1 :]], means, strict=True)))


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], caption: str = "") -> Chart | None:
    """Distillation loss by step; None where there is nothing to draw.

    Running means; where it is one curve only, its single steps lie behind them.

    Args:
        curves: by name, as for `running_mean`.
        caption: what else a reader must know.

    """
    found = {name: means for name, curve in curves.items() if (means := running_mean(curve))}
    if not found:
        return None
    single = [_thinned(_finite(curves[name])) for name in found] if len(found) == 1 else []
    shown = [point for points in (*found.values(), *single) for point in points]

    def draw(width: int) -> Drawing:
        x_of = partial(axis, [step for step, _ in shown], zero=True)
        y_of = partial(axis, [loss for _, loss in shown], zero=True)
        on = plane(width, x_of, y_of, "step", "distillation loss, nats/token", tall=360, integers=True)
        for style, every in (("faint", single), ("curve", found.values())):
            for k, points in enumerate(every):
                on.parts.append(polyline([(on.x(step), on.y(loss)) for step, loss in points], series(k)[0], style))
        return Drawing(on.height, on.parts)

    rows = (
        (name, number(step), number(loss))
        for name, points in found.items()
        for step, loss in points[:: max(1, len(points) // ROWS)]
    )
    several = f", {len(found)} curves" if len(found) > 1 else ""
    told = f"Running means over a twentieth of the steps{', single steps behind them' if single else ''}."
    return Chart(
        f"Distillation loss by step{several}",
        draw,
        tuple(Entry(name, series(k)[0]) for k, name in enumerate(found)),
        " ".join(filter(None, (told, caption))),
        ("healing", "step", "loss"),
        tuple(rows),
    )


def _finite(curve: Sequence[Mapping[str, float]]) -> Points:
    return [(float(e["step"]), float(e["loss"])) for e in curve if math.isfinite(as_number(e.get("loss")))]


def _thinned(points: Points) -> Points:
    return [points[k] for k in sorted({round(x) for x in np.linspace(0, len(points) - 1, POINTS)})]
