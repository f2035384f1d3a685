"""Damage of every method: with 95 % intervals at each budget, and against the budget where there are several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from excise.report.material import Material
from excise.report.section import Section
from excise.report.svg import (
    NARROW,
    Axis,
    axis,
    figure,
    frame,
    legend,
    line,
    marker,
    number,
    responsive,
    svg,
    table,
    text,
)
from excise.text import ranges

COLOURED = 8
Row = Mapping[str, Any]


def damage_rows(material: Material) -> list[Row]:
    """Rows with `method`, `remove`, `delta`, maybe `interval`: of compare.json, else what runs measured."""
    if rows := material.compare.get("rows"):
        return [row for row in rows if _finite(row.get("delta"))]
    return [
        {"method": method, "remove": budget, "removed": m.removed, "delta": m.delta}
        for budget, found in material.measured.items()
        for m in found
        for method in m.methods
        if math.isfinite(m.delta)
    ]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _render(material: Material) -> Markup | None:
    rows = damage_rows(material)
    budgets = sorted({row["remove"] for row in rows})
    if not rows or (len(budgets) == 1 and not material.compare):
        return None
    parts = []
    if len(budgets) > 1:
        parts.append(_against_budget(rows))
    if material.compare:
        shown = material.run.get("budget") if material.run.get("budget") in budgets else budgets[-1]
        for budget in budgets:
            own = [row for row in rows if row["remove"] == budget]
            inner = _at_budget(sorted(own, key=lambda row: row["delta"]), budget)
            parts.append(
                Markup("<details{}><summary>M = {}: every method with its interval</summary>{}</details>").format(
                    Markup(" open") if budget == shown else "", budget, inner
                )
            )
        for name, why in material.compare.get("skipped", {}).items():
            parts.append(Markup('<p class="note">{} is left out: {}</p>').format(name, why))
    return Markup("").join(parts)


def _mean_rank(rows: Sequence[Row]) -> list[str]:
    """Methods, the least damaging first (mean over budgets)."""
    by_method: dict[str, list[float]] = {}
    for row in rows:
        by_method.setdefault(str(row["method"]), []).append(row["delta"])
    widest = max(map(len, by_method.values()))
    return sorted(
        by_method, key=lambda name: (widest - len(by_method[name]), sum(by_method[name]) / len(by_method[name]))
    )


def _against_budget(rows: Sequence[Row]) -> Markup:
    order = _mean_rank(rows)
    styles = {name: (f"s{k}", k) if k < COLOURED else ("random", k) for k, name in enumerate(order)}
    label = "Measured damage against the number of removed blocks, by method"

    def draw(width: int) -> Markup:
        height = 320 if width == NARROW else 420
        x = axis([row["remove"] for row in rows], 58, width - 16)
        y = _damage_axis(rows, height - 52, 34)
        parts = frame(x, y, "blocks removed, M", "Δ loss, nats/token", integers=True)
        for name in reversed(order):
            colour, shape = styles[name]
            own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["remove"])
            path = " ".join(f"{x(row['remove']):.1f},{y(row['delta']):.1f}" for row in own)
            parts.append(Markup('<polyline points="{}" class="curve" style="--c:var(--{})"/>').format(path, colour))
            for row in own:
                if row.get("interval"):
                    low, high = (y(value) for value in row["interval"])
                    bar = Markup('<path d="M{:.1f} {:.1f}V{:.1f}" class="error" style="--c:var(--{})"/>')
                    parts.append(bar.format(x(row["remove"]), low, high, colour))
                parts.append(marker(x(row["remove"]), y(row["delta"]), colour, _tip(row), shape=shape))
        return svg(width, height, label, parts)

    named = [(name, *styles[name]) for name in order[:COLOURED]]
    others = [(f"{len(order) - COLOURED} others", "random", 0)] if len(order) > COLOURED else []
    cells = [(row["method"], row["remove"], number(row["delta"]), _interval(row), _what(row)) for row in rows]
    behind = table(("method", "M", "Δ loss", "95 % interval", "blocks removed"), cells, label)
    caption = Markup("Lower is better. Whiskers are 95 % intervals where there are any.")
    return figure(legend([*named, *others]) + responsive(draw), caption, behind)


def _at_budget(rows: Sequence[Row], budget: int) -> Markup:
    label = f"Measured damage of every method at M = {budget}"

    def draw(width: int) -> Markup:
        narrow = width == NARROW
        step, left = (36, 12) if narrow else (26, 230)
        height = 14 + step * len(rows) + 52
        x, bottom = _damage_axis(rows, left, width - 16), height - 50
        parts = []
        for tick in x.ticks(4 if narrow else 8):
            parts += [line(x(tick), 8, x(tick), bottom, "grid"), text(x(tick), bottom + 19, number(tick))]
        parts.append(text((left + width - 16) / 2, bottom + 40, "Δ loss, nats/token", style="title"))
        for k, row in enumerate(rows):
            at = 14 + step * k + (24 if narrow else 12)
            name_at = (left, at - 10, "start") if narrow else (left - 12, at + 4, "end")
            parts.append(text(name_at[0], name_at[1], row["method"], anchor=name_at[2], style="name"))
            colour = "chosen" if _tied(row) else "ours"
            if row.get("interval"):
                low, high = (x(value) for value in row["interval"])
                parts.append(line(low, at, high, at, "whisker"))
            parts.append(marker(x(row["delta"]), at, colour, _tip(row)))
        return svg(width, height, label, parts)

    cells = [(row["method"], number(row["delta"]), _interval(row), _tie(row), _what(row), _tokens(row)) for row in rows]
    head = ("method", "Δ loss", "95 % interval", "behind the best", "blocks removed", "cost, tokens")
    entries = [("best, or not told apart from it", "chosen", 0), ("more damage than the best", "ours", 0)]
    return figure(legend(entries) + responsive(draw), Markup("Least damage first."), table(head, cells, label))


def _what(row: Row) -> str:
    """Blocks, or the sublayers of a sublayer method."""
    return ", ".join(row.get("sublayers", ())) or ranges(row["removed"]).replace(",", ", ")


def _damage_axis(rows: Sequence[Row], start: float, end: float) -> Axis:
    """Linear from 0; logarithmic where damages differ by more than a factor of 30, as between good and bad methods."""
    deltas = [row["delta"] for row in rows]
    ends = [value for row in rows for value in (row.get("interval") or ()) if _finite(value)]
    if min(deltas) > 0 and max(deltas) > 30 * min(deltas):
        return axis([*deltas, *(value for value in ends if value >= min(deltas))], start, end, log=True)
    return axis([*deltas, *ends], start, end, zero=True)


def _tip(row: Row) -> str:
    return f"{row['method']}, M = {row['remove']}: Δ loss {number(row['delta'])} {_interval(row)}".strip()


def _interval(row: Row) -> str:
    return f"[{number(row['interval'][0])}, {number(row['interval'][1])}]" if row.get("interval") else ""


def _tied(row: Row) -> bool:
    """Whether the paired 95 % interval of the distance to the best holds 0."""
    low, high = row.get("behind_interval") or (1.0, 1.0)
    return bool(low <= 0 <= high)


def _tie(row: Row) -> str:
    if "behind" not in row:
        return ""
    return f"{number(row['behind'])}{' (a tie)' if _tied(row) and row['behind'] > 0 else ''}"


def _tokens(row: Row) -> str:
    if "forward_tokens" not in row:
        return ""
    return number(row["forward_tokens"] + row.get("backward_tokens", 0.0))


SECTION = Section(
    "damage",
    "Damage by method",
    _render,
    ("excise compare MODEL --remove 4,8,12 --out DIR", "damage of every method, with intervals"),
)
