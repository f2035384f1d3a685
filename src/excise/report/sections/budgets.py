"""Damage against M: predicted by the fitted energy at every M, and measured where anything was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from markupsafe import Markup

from excise.artefacts import as_number
from excise.drawing.axes import axis, number, plane
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.svg import line, marker, polyline
from excise.report.html import figure
from excise.report.material import Material
from excise.report.section import Section
from excise.report.words import FITTED, Z

FIGURE = "damage_of_budgets"
PREDICTED = Entry("predicted: lowest of the fitted energy", "lighter", 0)
MEASURED = Entry("measured: least by the refinement's objective", "ours", 2)
WRITTEN = Entry("as written: Δ loss on held-out text", "chosen", 1)


class Point(NamedTuple):
    """Damage at a budget, and half its 95 % interval, nats per token; 0 where no interval is known."""

    budget: int
    damage: float
    within: float = 0.0


def points_of(material: Material) -> dict[Entry, list[Point]]:
    """What is known of the damage at each M, by ascending M; empty series are left out."""
    predicted = [Point(m, spectrum[0].energy) for m, spectrum in material.spectra.get(FITTED, {}).items()]
    least: dict[int, float] = {}
    for facts in material.refined.values():
        for each in facts.get("measured", ()):
            # The least of damages on different samples would be that of the samples which suffer least.
            damage, m = as_number(each.get("compared", each["damage"])), len(each["removed"])
            if math.isfinite(damage):
                least[m] = min(damage, least.get(m, math.inf))
    written = [
        Point(
            run["budget"],
            run.get("checkpoint_loss", run["pruned_loss"]) - run["base_loss"],
            Z * ((run.get("damage") or {}).get("error") or 0.0),
        )
        for run in material.runs
    ]
    series = {PREDICTED: predicted, MEASURED: [Point(*pair) for pair in sorted(least.items())], WRITTEN: written}
    return {entry: points for entry, points in series.items() if points}


def budget_chart(series: dict[Entry, list[Point]]) -> Chart | None:
    """Damage against M; None where fewer than two budgets are known.

    Args:
        series: as `points_of` gives them.

    """
    every = [point for points in series.values() for point in points]
    if len({point.budget for point in every}) < 2:
        return None

    def draw(width: int) -> Drawing:
        ends = [point.damage + sign * point.within for point in every for sign in (-1, 1)]
        x_of, y_of = partial(axis, [point.budget for point in every]), partial(axis, ends, zero=True)
        on = plane(width, x_of, y_of, "blocks removed, M", "damage, nats/token", integers=True)
        if PREDICTED in series:
            on.parts.append(polyline([(on.x(m), on.y(damage)) for m, damage, _ in series[PREDICTED]], PREDICTED.colour))
        for (name, colour, shape), points in series.items():
            for m, damage, within in points:
                if within:
                    at = on.x(m)
                    on.parts.append(line(at, on.y(damage - within), at, on.y(damage + within), "whisker"))
                on.parts.append(marker(on.x(m), on.y(damage), colour, _tip(name, m, damage, within), shape=shape))
        return Drawing(on.height, on.parts)

    return Chart(
        "Damage against the number of removed blocks",
        draw,
        tuple(series),
        _caption(series),
        ("", "M", "damage", "± (95 %)"),
        tuple((entry.name, m, number(d), number(w) if w else "") for entry, rows in series.items() for m, d, w in rows),
    )


def _tip(name: str, budget: int, damage: float, within: float) -> str:
    return f"{name}, M = {budget}: {number(damage)}{f' ± {number(within)}' if within else ''}"


def _caption(series: dict[Entry, list[Point]]) -> str:
    told = ["Whiskers are 95 % intervals."] if any(point.within for point in series.get(WRITTEN, ())) else []
    measured: Sequence[Point] = series.get(MEASURED, ())
    if PREDICTED in series and measured:
        known = ", ".join(str(point.budget) for point in measured)
        told.insert(0, f"The energy was fitted to removals of M = {known}; elsewhere it is no more than a guide.")
    return " ".join(told)


def figures(material: Material) -> dict[str, Chart]:
    """Damage against M."""
    chart = budget_chart(points_of(material))
    return {FIGURE: chart} if chart else {}


def _render(material: Material) -> Markup | None:
    charts = figures(material)
    return figure(charts[FIGURE]) if charts else None


SECTION = Section(
    "budgets",
    "Damage against M",
    _render,
    ("excise run MODEL --remove 8 --out DIR", "damage predicted at every M"),
    figures,
)
