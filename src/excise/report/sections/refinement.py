"""Refinement: measured damage against that predicted from all other removals, and the race of the finalists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from markupsafe import Markup

from excise.artefacts import as_number
from excise.drawing.axes import axis, number, plane
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.panels import beside, crowded
from excise.drawing.svg import line, marker
from excise.plain import Values
from excise.report.html import figure, table
from excise.report.material import Material
from excise.report.section import Section
from excise.report.tables import worst_of
from excise.text import ranges

# What was predicted, each from all others.
LOOP, RANDOM = Entry("proposed by the loop", "ours", 0), Entry("random", "random", 1)
Pairs = list[tuple[float, float]]


def predictions(facts: Values) -> tuple[Pairs, Pairs]:
    """(predicted, measured) damage of what the loop proposed, and of random removals.

    Args:
        facts: one budget of candidates.json.

    """
    proposed = [pair for r in facts["rounds"] for pair in zip(r["predicted"], r["measured"], strict=True)]
    found = (
        [(p, m) for p, m in pairs if math.isfinite(as_number(p)) and math.isfinite(as_number(m))]
        for pairs in (proposed, facts["anchors"])
    )
    loop, random = found
    return loop, random


def trust_chart(facts: Values, budget: int) -> Chart | None:
    """Measured damage against that predicted from all other removals; None where nothing was predicted.

    Args:
        facts: as for `predictions`.
        budget: M.

    """
    loop, random = predictions(facts)
    every = [*loop, *random]
    if not every:
        return None

    bound = crowded([measured for _, measured in every])

    def panel(most: float, width: int) -> Drawing:
        shown = [(predicted, measured) for predicted, measured in every if measured <= most]
        x_of = partial(axis, [predicted for predicted, _ in shown], zero=most == math.inf)
        y_of = partial(axis, [measured for _, measured in shown], zero=most == math.inf)
        on = plane(width, x_of, y_of, "predicted damage", "measured")
        low, high = max(on.x.low, on.y.low), min(on.x.high, on.y.high)
        if low < high:
            on.parts.append(line(on.x(low), on.y(low), on.x(high), on.y(high), "reference"))
        for pairs, (name, colour, shape) in ((random, RANDOM), (loop, LOOP)):
            for predicted, measured in (pair for pair in pairs if pair in shown):
                tip = f"{name}: predicted {number(predicted)}, measured {number(measured)}"
                on.parts.append(marker(on.x(predicted), on.y(measured), colour, tip, shape=shape))
        return Drawing(on.height, on.parts)

    def draw(width: int) -> Drawing:
        return beside(width, [partial(panel, most) for most in (math.inf, bound) if most is not None])

    said = [
        f"{name} {rho:.2f}"
        for name, rho in ((LOOP.name, facts.get("low_rho")), (RANDOM.name, facts.get("random_rho")))
        if rho is not None
    ]
    named = ((loop, LOOP.name), (random, RANDOM.name))
    return Chart(
        f"Measured damage against that predicted from all other removals, at M = {budget}",
        draw,
        (LOOP, RANDOM),
        f"Spearman ρ: {', '.join(said) or 'too few'}. On the dashed line the prediction is right."
        + ("" if bound is None else " Beside it those of less damage, on scales of their own."),
        ("", "predicted", "measured"),
        tuple((name, number(p), number(m)) for pairs, name in named for p, m in pairs),
    )


def budget_figures(refined: Mapping[int, Values]) -> dict[str, Chart]:
    """Predicted against measured, one figure per budget, by the names of their files.

    Args:
        refined: contents of candidates.json, by budget.

    """
    charts = {f"predictions-{budget}": trust_chart(facts, budget) for budget, facts in refined.items()}
    return {name: chart for name, chart in charts.items() if chart}


def _render(material: Material) -> Markup | None:
    parts = []
    for budget, facts in material.refined.items():
        heading = Markup("<h3>M = {}</h3>").format(budget) if len(material.refined) > 1 else Markup("")
        chart = trust_chart(facts, budget)
        parts.append(heading + (figure(chart) if chart else Markup("")) + _race(facts))
    return Markup("").join(parts) if parts else None


def _race(facts: Values) -> Markup:
    rows = [
        (
            ranges(f["removed"]).replace(",", ", "),
            f"{number(f['damage'])} ± {number(f['error'])}",
            number(f["predicted"]),
            worst_of(f.get("domains", {})),
            f"{f['tokens']:,}",
        )
        for f in facts["finalists"]
    ]
    head = ("blocks removed", "measured", "predicted", "worst domain", "on tokens")
    return table(head, rows, "The race of the finalists, the winner first", fold="")


SECTION = Section(
    "refinement",
    "Refinement",
    _render,
    ("excise refine MODEL --remove 8 --out DIR/refined", "an energy fitted to measured damage"),
    lambda material: budget_figures(material.refined),
)
