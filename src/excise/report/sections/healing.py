"""Healing: distillation loss by step, and the held-out loss before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from excise.report.material import Material
from excise.report.section import Section
from excise.report.svg import NARROW, axis, figure, frame, legend, number, responsive, svg, table

PALETTE = 8
POINTS = 200
Curve = list[tuple[float, float]]


def curves(healing: Mapping[str, Mapping[str, Any]]) -> dict[str, Curve]:
    """Points (step, distillation loss in nats per token) by name: running means, at most 200 a curve.

    Args:
        healing: contents of heal.json by name; each has `curve`, a list of {"step", "loss", …}.

    """
    found = {}
    for name, facts in healing.items():
        steps = [(e["step"], e["loss"]) for e in facts.get("curve", ()) if math.isfinite(e.get("loss", math.nan))]
        if not steps:
            continue
        window = max(1, len(steps) // 20)
        losses = np.convolve([loss for _, loss in steps], np.ones(window) / window, mode="valid")
        means = list(zip([float(step) for step, _ in steps[window - 1 :]], losses.tolist(), strict=True))
        found[name] = [means[k] for k in sorted({round(x) for x in np.linspace(0, len(means) - 1, POINTS)})]
    return found


def _render(material: Material) -> Markup | None:
    if not material.healing:
        return None
    parts = [_held_out(material.healing)]
    if found := curves(material.healing):
        parts.append(_chart(found))
    return Markup("").join(parts)


def _held_out(healing: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows = []
    for name, facts in healing.items():
        losses = facts.get("losses", {})
        original, pruned, healed = (losses.get(key) for key in ("original", "pruned", "healed"))
        known = None not in (original, pruned, healed) and pruned != original
        share = f"{(pruned - healed) / (pruned - original):.0%}" if known else ""
        cells = ("" if loss is None else f"{loss:.4f}" for loss in (original, pruned, healed))
        rows.append((name, *cells, share, facts.get("steps", "")))
    head = ("healed model", "original", "pruned", "healed", "of the damage undone", "steps")
    return table(head, rows, "Loss on held-out text, nats/token", fold="")


def _chart(found: Mapping[str, Curve]) -> Markup:
    label = f"Distillation loss by step, {len(found)} curves"

    def draw(width: int) -> Markup:
        height = 280 if width == NARROW else 360
        x = axis([step for points in found.values() for step, _ in points], 58, width - 16, zero=True)
        y = axis([loss for points in found.values() for _, loss in points], height - 52, 34, zero=True)
        parts = frame(x, y, "step", "distillation loss, nats/token", integers=True)
        for k, points in enumerate(found.values()):
            path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
            line = Markup('<polyline points="{}" class="curve" style="--c:var(--s{})"/>')
            parts.append(line.format(path, k % PALETTE))
        return svg(width, height, label, parts)

    rows = [
        (name, number(step), number(loss)) for name, points in found.items() for step, loss in points[:: POINTS // 20]
    ]
    entries = [(name, f"s{k % PALETTE}", 1) for k, name in enumerate(found)]
    caption = Markup("Running means over a twentieth of the steps.")
    return figure(legend(entries) + responsive(draw), caption, table(("healing", "step", "loss"), rows, label))


SECTION = Section(
    "healing", "Healing", _render, ("excise heal DIR/model --teacher MODEL --out DIR/healed", "healing curves")
)
