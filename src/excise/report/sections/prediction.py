"""Predicted energy against measured damage, with Spearman's rank correlation (one chart a budget)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup
from scipy.stats import spearmanr

from excise.report.material import Material, Measured
from excise.report.section import Section
from excise.report.svg import NARROW, axis, figure, frame, legend, marker, number, responsive, svg, table, text
from excise.text import ranges

OTHERS = "other energies and refinement"
# Colour and shape of each group, as in the PNG figures.
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


def _render(material: Material) -> Markup | None:
    energy = str(material.run.get("energy") or material.compare.get("energy") or "")
    charts = []
    for budget, every in material.measured.items():
        found = [m for m in every if m.energy is not None and math.isfinite(m.delta)]
        if len(found) >= 2:
            chosen = next((tuple(run["removed"]) for run in material.runs if run["budget"] == budget), None)
            charts.append(
                Markup('<div data-budget="{}">{}</div>').format(budget, _chart(found, chosen, energy, budget))
            )
    if not charts:
        return None
    absent = Markup(
        '<p class="note" data-budget="none">Nothing is measured at this M; <code>excise verify MODEL --spectrum '
        "FILE</code> with its output in this folder adds it.</p>"
    )
    return Markup("").join([*charts, absent])


def _chart(found: Sequence[Measured], chosen: tuple[int, ...] | None, energy: str, budget: int) -> Markup:
    groups = {name: [m for m in found if group_of(m, energy) == name] for name in STYLES}
    rho = spearman(found)
    said = "n/a" if rho is None else number(round(rho, 2))
    label = f"Measured damage against predicted energy at M = {budget}, {len(found)} removals, Spearman ρ = {said}"

    def draw(width: int) -> Markup:
        height = 300 if width == NARROW else 380
        x = axis([float(m.energy or 0) for m in found], 58, width - 16, log=True)
        y = axis([m.delta for m in found], height - 52, 34, zero=True)
        parts = frame(x, y, f"energy ({energy or 'of the run'})", "Δ loss, nats/token")
        for name, members in groups.items():
            colour, shape = STYLES[name]
            for m in members:
                tip = f"{', '.join(m.methods)}: energy {number(float(m.energy or 0))}, Δ loss {number(m.delta)}"
                extra = Markup(' data-removed="{}"').format(",".join(map(str, m.removed)))
                parts.append(marker(x(float(m.energy or 0)), y(m.delta), colour, tip, shape=shape, extra=extra))
        for m in found:
            if m.removed == chosen:
                ring = '<circle cx="{:.1f}" cy="{:.1f}" r="11" class="ring"/>'
                parts.append(Markup(ring).format(x(float(m.energy or 0)), y(m.delta)))
        parts.append(text(width - 16, 20, f"Spearman ρ = {said}", anchor="end", style="title"))
        return svg(width, height, label, parts)

    rows = [
        (", ".join(m.methods), ranges(m.removed), number(float(m.energy or 0)), number(m.delta), number(m.perplexity))
        for m in found
    ]
    behind = table(("proposed by", "blocks removed", "energy", "Δ loss", "perplexity"), rows, label)
    entries = [(name, *STYLES[name]) for name, members in groups.items() if members]
    caption = Markup("M = {}: Spearman ρ = {} over {} removals; the ring marks what was removed.").format(
        budget, said, len(found)
    )
    return figure(legend(entries) + responsive(draw), caption, behind)


SECTION = Section(
    "prediction",
    "Predicted against measured",
    _render,
    ("excise verify MODEL --spectrum spectrum-fisher.json --gradients gradients.safetensors", "measured damage"),
)
