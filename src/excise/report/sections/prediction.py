"""Predicted energy against measured damage, with Spearman's rank correlation (one chart per budget)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from markupsafe import Markup
from scipy.stats import spearmanr

from excise.drawing.axes import Plane, axis, number, plane
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.panels import beside, crowded
from excise.drawing.svg import marker, text
from excise.report.html import figure
from excise.report.material import Material, Measured
from excise.report.section import Section
from excise.text import ranges

FIGURE = "energy_and_loss"
# A removal with its energy.
Point = tuple[Measured, float]
OTHERS = "other energies and refinement"
# Colour and shape of each group.
STYLES = {
    "states of the energy": ("ours", 0),
    OTHERS: ("lighter", 2),
    "rivals": ("rival", 3),
    "random": ("random", 1),
}


def spearman(found: Sequence[Measured]) -> float | None:
    """Rank correlation of energy and damage over distinct removals; None for fewer than three."""
    pairs = [(m.energy, m.delta) for m in found if m.energy is not None and math.isfinite(m.delta)]
    if len(pairs) < 3:
        return None
    rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return rho if math.isfinite(rho) else None


def group_of(measured: Measured, energy: str) -> str:
    """Which of the groups a removal is drawn in: by the first that proposed it, the energy's own states before all."""
    names = [method.partition(":") for method in measured.methods]
    if any(name == energy for name, _, _ in names):
        return "states of the energy"
    if all(name == "random" for name, _, _ in names):
        return "random"
    return OTHERS if any(colon and name != "random" for name, colon, _ in names) else "rivals"


def damage_chart(every: Sequence[Measured], chosen: Sequence[int] | None, energy: str, budget: int) -> Chart | None:
    """Measured damage against energy, the removal that was chosen ringed; None for fewer than two points.

    Args:
        every: removals; those without an energy or of infinite damage are left out.
        chosen: what was removed.
        energy: its name.
        budget: M.

    """
    found = [(m, float(m.energy)) for m in every if m.energy is not None and math.isfinite(m.delta)]
    if len(found) < 2:
        return None
    present = {group_of(m, energy) for m, _ in found}
    rho = spearman([m for m, _ in found])
    said = "n/a" if rho is None else number(round(rho, 2))
    bound = crowded([m.delta for m, _ in found])
    best = [] if bound is None else [(m, at) for m, at in found if m.delta <= bound]

    def panel(points: Sequence[Point], title: str, width: int) -> Drawing:
        x_of = partial(axis, [at for _, at in points], log=True)
        y_of = partial(axis, [m.delta for m, _ in points], zero=points is found)
        on = plane(width, x_of, y_of, f"energy ({energy or 'of the run'})", "Δ loss, nats/token")
        marks = _marks(on, points, energy, chosen)
        heading = text(width - 16, 20, title, anchor="end", style="title")
        return Drawing(on.height, [*on.parts, *marks, heading])

    def draw(width: int) -> Drawing:
        panels = [partial(panel, found, f"Spearman ρ = {said}")]
        if best:
            panels.append(partial(panel, best, f"the {len(best)} of least damage"))
        return beside(width, panels)

    ring = "" if chosen is None else "; the ring marks what was removed"
    closer = "" if bound is None else f" Beside it the {len(best)} of least damage, on scales of their own."
    rows = (
        (", ".join(m.methods), ranges(m.removed), number(at), number(m.delta), number(m.perplexity)) for m, at in found
    )
    return Chart(
        f"Measured damage against predicted energy at M = {budget}, {len(found)} removals, Spearman ρ = {said}",
        draw,
        tuple(Entry(name, *style) for name, style in STYLES.items() if name in present),
        f"M = {budget}: Spearman ρ = {said} over {len(found)} removals{ring}.{closer}",
        ("proposed by", "blocks removed", "energy", "Δ loss", "perplexity"),
        tuple(rows),
    )


def _marks(on: Plane, points: Sequence[Point], energy: str, chosen: Sequence[int] | None) -> list[Markup]:
    """The points, by group in the order of the legend, and the ring around what was removed."""
    parts = []
    for m, at in sorted(points, key=lambda point: [*STYLES].index(group_of(point[0], energy))):
        colour, shape = STYLES[group_of(m, energy)]
        tip = f"{', '.join(m.methods)}: energy {number(at)}, Δ loss {number(m.delta)}"
        extra = Markup(' data-removed="{}"').format(",".join(map(str, m.removed)))
        parts.append(marker(on.x(at), on.y(m.delta), colour, tip, shape=shape, extra=extra))
    ring = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="11" class="ring"/>')
    rings = [ring.format(on.x(at), on.y(m.delta)) for m, at in points if chosen is not None and m.removed == (*chosen,)]
    return [*parts, *rings]


def _charts(material: Material) -> dict[int, Chart]:
    energy = str(material.run.get("energy") or material.compare.get("energy") or "")
    chosen = {run["budget"]: run["removed"] for run in reversed(material.runs)}
    charts = {m: damage_chart(every, chosen.get(m), energy, m) for m, every in material.measured.items()}
    return {budget: chart for budget, chart in charts.items() if chart}


def figures(material: Material) -> dict[str, Chart]:
    """Measured damage against energy, one figure per budget."""
    return {f"{FIGURE}-{budget}": chart for budget, chart in _charts(material).items()}


def _render(material: Material) -> Markup | None:
    charts = [
        Markup('<div data-budget="{}">{}</div>').format(budget, figure(chart))
        for budget, chart in _charts(material).items()
    ]
    if not charts:
        return None
    absent = Markup(
        '<p class="note" data-budget="none">Nothing is measured at this M; <code>excise verify MODEL --spectrum '
        "FILE</code> with its output in this folder adds it.</p>"
    )
    return Markup("").join([*charts, absent])


SECTION = Section(
    "prediction",
    "Predicted against measured",
    _render,
    ("excise verify MODEL --spectrum spectrum-fisher.json --gradients gradients.safetensors", "measured damage"),
    figures,
)
