"""Healing curves: loss on held-out text against the tokens trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from excise.report.material import Material
from excise.report.section import Section
from excise.report.svg import NARROW, axis, figure, frame, legend, line, marker, number, responsive, svg, table

PALETTE = 8
Curve = tuple[str, list[tuple[float, float]]]


def curves(healing: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Name and points (tokens, loss on held-out text in nats per token) of every heal.json.

    A heal.json names itself by `name` or `method` and holds `curve`, a list of {"tokens": …, "loss": …}.
    """
    found = []
    for k, facts in enumerate(healing):
        points = [
            (float(point["tokens"]), float(point["loss"]))
            for point in facts.get("curve", ())
            if math.isfinite(point.get("loss", math.nan)) and "tokens" in point
        ]
        if points:
            found.append((str(facts.get("name") or facts.get("method") or f"healing {k + 1}"), sorted(points)))
    return found


def _render(material: Material) -> Markup | None:
    found = curves(material.healing)
    if not found:
        return None
    base = material.run.get("base_loss")
    label = f"Loss on held-out text while healing, {len(found)} curves"

    def draw(width: int) -> Markup:
        height = 300 if width == NARROW else 380
        x = axis([t for _, points in found for t, _ in points], 58, width - 16, zero=True)
        losses = [loss for _, points in found for _, loss in points]
        y = axis([*losses, *([base] if base is not None else [])], height - 52, 34)
        parts = frame(x, y, "tokens trained on", "loss, nats/token")
        if base is not None:
            parts.append(line(x.start, y(base), x.end, y(base), "reference"))
        for k, (name, points) in enumerate(found):
            colour = f"s{k % PALETTE}"
            path = " ".join(f"{x(t):.1f},{y(loss):.1f}" for t, loss in points)
            parts.append(Markup('<polyline points="{}" class="curve" style="--c:var(--{})"/>').format(path, colour))
            for t, loss in points:
                parts.append(marker(x(t), y(loss), colour, f"{name}: {number(t)} tokens, {number(loss)}", shape=k))
        return svg(width, height, label, parts)

    rows = [(name, number(t), number(loss)) for name, points in found for t, loss in points]
    caption = Markup("" if base is None else "The dashed line is the intact model.")
    entries = [(name, f"s{k % PALETTE}", k) for k, (name, _) in enumerate(found)]
    return figure(legend(entries) + responsive(draw), caption, table(("healing", "tokens", "loss"), rows, label))


SECTION = Section("healing", "Healing", _render, ("excise heal DIR/model", "healing curves"))
