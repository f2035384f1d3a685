"""Damage of every method: with 95 % intervals at each budget, and against the budget where there are several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from markupsafe import Markup

from excise.drawing.axes import NARROW, Axis, axis, frame, number, plane, row_frame
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.style import SERIES, series
from excise.drawing.svg import line, marker, polyline, text
from excise.plain import Plain, Values
from excise.report.html import figure
from excise.report.material import Material
from excise.report.section import Section
from excise.text import ranges

AGAINST_BUDGET, AGAINST_COST = "damage_against_budget", "damage_against_cost"
Row = Values


def damage_rows(material: Material) -> list[Row]:
    """Rows with `method`, `remove`, `delta`, maybe `interval`: of compare.json, else what runs measured."""
    if rows := material.compare.get("rows"):
        return list(rows)
    return [
        {"method": method, "remove": budget, "removed": m.removed, "delta": m.delta}
        for budget, found in material.measured.items()
        for m in found
        for method in m.methods
    ]


def against_budget(rows: Sequence[Row]) -> Chart | None:
    """Damage of every method against M; None for fewer than two budgets.

    Args:
        rows: as `damage_rows` gives them; those of infinite damage are left out.

    """
    rows = _drawn(rows)
    if len(_budgets(rows)) < 2:
        return None
    styles = _styles(rows)

    def draw(width: int) -> Drawing:
        x_of = partial(axis, [row["remove"] for row in rows])
        on = plane(
            width, x_of, partial(_damage_axis, rows), "blocks removed, M", "Δ loss, nats/token", tall=420, integers=True
        )
        for place, (name, (colour, shape)) in reversed(list(enumerate(styles.items()))):
            own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["remove"])
            # Beyond one line per colour the eye follows none: the methods of most damage stand back.
            style = "curve" if place < SERIES else "faint"
            on.parts.append(polyline([(on.x(row["remove"]), on.y(row["delta"])) for row in own], colour, style))
            for row in own:
                at = on.x(row["remove"])
                if row.get("interval"):
                    low, high = (on.y(value) for value in row["interval"])
                    on.parts.append(line(at, low, at, high, f"error stroke-{colour}"))
                on.parts.append(marker(at, on.y(row["delta"]), colour, _tip(row), shape=shape))
        return Drawing(on.height, on.parts)

    return Chart(
        "Measured damage against the number of removed blocks, by method",
        draw,
        _entries(styles),
        "Lower is better. Whiskers are 95 % intervals where there are any.",
        ("method", "M", "Δ loss", "95 % interval", "blocks removed"),
        tuple((row["method"], row["remove"], number(row["delta"]), _interval(row), _what(row)) for row in rows),
    )


def against_cost(rows: Sequence[Row]) -> Chart | None:
    """Damage of every method against what choosing cost, one panel per budget; None where no cost is known.

    Args:
        rows: as for `against_budget`.

    """
    rows = [row for row in _drawn(rows) if "forward_tokens" in row]
    if not rows:
        return None
    budgets, styles = _budgets(rows), _styles(rows)
    costs = [_cost(row) for row in rows]

    def scale(start: float, end: float) -> tuple[Axis, float]:
        """The scale of costs, and where 0 is on it."""
        paid = [cost for cost in costs if cost > 0]
        # Some methods only look at the weights, or at nothing: their 0 has a place of its own before powers of ten.
        x = axis(paid or costs, start if paid == costs else start + 30, end, log=True)
        if x.logarithmic:
            return x, start + 8
        x = axis(costs, start, end, zero=True)
        return x, x(0)

    def draw(width: int) -> Drawing:
        across = 1 if width <= NARROW else min(2, len(budgets))
        tall, wide = 300, width / across
        parts = []
        for place, budget in enumerate(budgets):
            left, top = place % across * wide, place // across * tall
            start = left + 58
            x, nothing = scale(start, left + wide - 16)
            y = _damage_axis(rows, top + tall - 52, top + 34)
            parts += frame(x, y, f"cost at M = {budget}, tokens", "Δ loss, nats/token", left=start)
            if nothing < x.start:
                parts.append(text(nothing, y.start + 19, "0"))
            for row in (row for row in rows if row["remove"] == budget):
                colour, shape = styles[str(row["method"])]
                at = x(_cost(row)) if _cost(row) > 0 else nothing
                parts.append(marker(at, y(row["delta"]), colour, f"{_tip(row)}, {_tokens(row)} tokens", shape=shape))
        return Drawing(tall * math.ceil(len(budgets) / across), parts)

    return Chart(
        "Measured damage against what choosing cost, by method",
        draw,
        _entries(styles),
        "Lower and further left is better. Cost in tokens through the intact model, forwards and backwards.",
        ("method", "M", "cost, tokens", "Δ loss", "95 % interval"),
        tuple((row["method"], row["remove"], _tokens(row), number(row["delta"]), _interval(row)) for row in rows),
    )


def at_budget(rows: Sequence[Row], budget: int) -> Chart | None:
    """Damage of every method at one M with its interval, least first; None where there is none.

    Args:
        rows: as for `against_budget`.
        budget: M.

    """
    own = sorted((row for row in _drawn(rows) if row["remove"] == budget), key=lambda row: row["delta"])
    if not own:
        return None

    def draw(width: int) -> Drawing:
        narrow = width <= NARROW
        step, left = (36, 12) if narrow else (26, 230)
        height = 14 + step * len(own) + 52
        x = _damage_axis(own, left, width - 16)
        parts = row_frame(x, height - 50, "Δ loss, nats/token")
        for k, row in enumerate(own):
            at = 14 + step * k + (24 if narrow else 12)
            name_at = (left, at - 10, "start") if narrow else (left - 12, at + 4, "end")
            parts.append(text(name_at[0], name_at[1], row["method"], anchor=name_at[2], style="name"))
            if row.get("interval"):
                low, high = (x(value) for value in row["interval"])
                parts.append(line(low, at, high, at, "whisker"))
            parts.append(marker(x(row["delta"]), at, "chosen" if _tied(row) else "ours", _tip(row)))
        return Drawing(height, parts)

    cells = ((r["method"], number(r["delta"]), _interval(r), _tie(r), _what(r), _tokens(r)) for r in own)
    return Chart(
        f"Measured damage of every method at M = {budget}",
        draw,
        (Entry("best, or not told apart from it", "chosen", 0), Entry("more damage than the best", "ours", 0)),
        "Least damage first. Whiskers are 95 % intervals.",
        ("method", "Δ loss", "95 % interval", "behind the best", "blocks removed", "cost, tokens"),
        tuple(cells),
    )


def comparison_figures(rows: Sequence[Row]) -> dict[str, Chart]:
    """Every figure of a comparison, by the names of their files.

    Args:
        rows: of compare.json.

    """
    charts = {
        AGAINST_BUDGET: against_budget(rows),
        AGAINST_COST: against_cost(rows),
        **{f"damage-{budget}": at_budget(rows, budget) for budget in _budgets(rows)},
    }
    return {name: chart for name, chart in charts.items() if chart}


def figures(material: Material) -> dict[str, Chart]:
    """Those of the folder's comparison, else what its runs measured against the budget."""
    rows = damage_rows(material)
    if material.compare:
        return comparison_figures(rows)
    chart = against_budget(rows)
    return {AGAINST_BUDGET: chart} if chart else {}


def _render(material: Material) -> Markup | None:
    rows = damage_rows(material)
    budgets = _budgets(rows)
    if not budgets:
        return None
    charts = figures(material)
    parts = [figure(charts[name]) for name in (AGAINST_BUDGET, AGAINST_COST) if name in charts]
    if material.compare:
        shown = material.run.get("budget") if material.run.get("budget") in budgets else budgets[-1]
        for budget in budgets:
            parts.append(
                Markup("<details{}><summary>M = {}: every method with its interval</summary>{}</details>").format(
                    Markup(" open") if budget == shown else "", budget, figure(charts[f"damage-{budget}"])
                )
            )
        for name, why in material.compare.get("skipped", {}).items():
            parts.append(Markup('<p class="note">{} is left out: {}</p>').format(name, why))
    return Markup("").join(parts) if parts else None


def _drawn(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if _finite(row.get("delta"))]


def _finite(value: Plain) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _budgets(rows: Iterable[Row]) -> list[int]:
    return sorted({row["remove"] for row in _drawn(rows)})


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, int]]:
    """Colour and shape by method, the least damaging first (mean over budgets)."""
    by_method: dict[str, list[float]] = {}
    for row in rows:
        by_method.setdefault(str(row["method"]), []).append(row["delta"])
    widest = max(map(len, by_method.values()))
    order = sorted(by_method, key=lambda m: (widest - len(by_method[m]), sum(by_method[m]) / len(by_method[m])))
    return {name: series(place) for place, name in enumerate(order)}


def _entries(styles: Mapping[str, tuple[str, int]]) -> tuple[Entry, ...]:
    return tuple(Entry(name, *style) for name, style in styles.items())


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


def _cost(row: Row) -> float:
    return float(row["forward_tokens"] + row.get("backward_tokens", 0.0))


def _tokens(row: Row) -> str:
    return number(_cost(row)) if "forward_tokens" in row else ""


SECTION = Section(
    "damage",
    "Damage by method",
    _render,
    ("excise compare MODEL --remove 4,8,12 --out DIR", "damage of every method, with intervals"),
    figures,
)
