"""Refinement: damage predicted before it was measured, against measured, and the race of the finalists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from excise.report.material import Material
from excise.report.section import Section
from excise.report.svg import NARROW, axis, figure, frame, legend, marker, number, responsive, svg, table
from excise.text import ranges

# Name, colour and shape of what was predicted before it was measured.
LOOP, RANDOM = ("proposed by the loop", "ours", 0), ("random", "random", 1)
Pairs = list[tuple[float, float]]


def predictions(facts: Mapping[str, Any]) -> tuple[Pairs, Pairs]:
    """(predicted, measured) damage of what the loop proposed, and of random removals, in nats.

    Args:
        facts: one budget of candidates.json.

    """
    proposed = [pair for r in facts["rounds"] for pair in zip(r["predicted"], r["measured"], strict=True)]
    found = (
        [(p, m) for p, m in pairs if math.isfinite(p) and math.isfinite(m)] for pairs in (proposed, facts["anchors"])
    )
    loop, random = found
    return loop, random


def _render(material: Material) -> Markup | None:
    parts = []
    for budget, facts in material.refined.items():
        heading = Markup("<h3>M = {}</h3>").format(budget) if len(material.refined) > 1 else Markup("")
        chart = _chart(facts, budget) if any(predictions(facts)) else Markup("")
        parts.append(heading + chart + _race(facts))
    return Markup("").join(parts) if parts else None


def _chart(facts: Mapping[str, Any], budget: int) -> Markup:
    loop, random = predictions(facts)
    label = f"Measured damage against the damage predicted before, at M = {budget}"

    def draw(width: int) -> Markup:
        height = 300 if width == NARROW else 380
        every = [*loop, *random]
        x = axis([predicted for predicted, _ in every], 58, width - 16, zero=True)
        y = axis([measured for _, measured in every], height - 52, 34, zero=True)
        parts = frame(x, y, "predicted damage, nats", "measured, nats")
        low, high = max(x.low, y.low), min(x.high, y.high)
        diagonal = Markup('<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" class="reference"/>')
        parts.append(diagonal.format(x(low), y(low), x(high), y(high)))
        for pairs, (name, colour, shape) in ((random, RANDOM), (loop, LOOP)):
            for predicted, measured in pairs:
                tip = f"{name}: predicted {number(predicted)}, measured {number(measured)}"
                parts.append(marker(x(predicted), y(measured), colour, tip, shape=shape))
        return svg(width, height, label, parts)

    rows = [(name, number(p), number(m)) for pairs, name in ((loop, LOOP[0]), (random, RANDOM[0])) for p, m in pairs]
    said = [
        f"{name} {rho:.2f}"
        for name, rho in ((LOOP[0], facts.get("low_rho")), (RANDOM[0], facts.get("random_rho")))
        if rho is not None
    ]
    caption = Markup("Spearman ρ: {}. On the dashed line the prediction is right.").format(", ".join(said) or "too few")
    return figure(legend([LOOP, RANDOM]) + responsive(draw), caption, table(("", "predicted", "measured"), rows, label))


def _race(facts: Mapping[str, Any]) -> Markup:
    rows = [
        (
            ranges(f["removed"]).replace(",", ", "),
            number(f["predicted"]),
            f"{number(f['damage'])} ± {number(f['error'])}",
            f"{f['tokens']:,}",
        )
        for f in facts["finalists"]
    ]
    head = ("blocks removed", "predicted", "measured", "on tokens")
    return table(head, rows, "The race of the finalists, the winner first", fold="")


SECTION = Section(
    "refinement",
    "Refinement",
    _render,
    ("excise refine MODEL --remove 8 --out DIR/refined", "an energy fitted to measured damage"),
)
