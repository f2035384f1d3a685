"""The panel: what the result can still do beside its original, with intervals, and their answers side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from excise.artefacts import as_number
from excise.drawing.axes import NARROW, Axis, number, row_frame
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.style import series
from excise.drawing.svg import line, marker, text
from excise.plain import Values
from excise.report.html import figure, table
from excise.report.material import Material
from excise.report.section import Section

FIGURE = "capabilities"
# Exchanges of each capability that stand side by side.
SHOWN = 2
MARKS = {True: " ▲", False: " ▼", None: ""}


def names_of(panel: Values) -> list[str]:
    """The panel's models, the original first; those that share a name are numbered."""
    names = [str(model["name"]) for model in panel["models"]]
    return [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names)]


def capabilities_chart(panel: Values) -> Chart | None:
    """Shares of answers that pass, a line for each capability and model; None where none was asked about.

    Args:
        panel: contents of panel.json.

    """
    rows = [row for row in panel["rows"] if row["group"] == "capabilities" and not row["variant"]]
    if not rows:
        return None
    names = names_of(panel)
    step = 12 * len(names) + 12

    def draw(width: int) -> Drawing:
        narrow = width <= NARROW
        left, above = (12, 16) if narrow else (230, 0)
        height = 14 + (step + above) * len(rows) + 52
        x = Axis(0.0, 1.0, left, width - 16)
        parts = row_frame(x, height - 50, "share of answers that pass")
        for place, row in enumerate(rows):
            top = 14 + (step + above) * place
            at = (left, top + 10, "start") if narrow else (left - 12, top + step / 2 + 4, "end")
            parts.append(text(at[0], at[1], row["name"], anchor=at[2], style="name"))
            for k, (name, found) in enumerate(zip(names, row["figures"], strict=True)):
                y = top + above + 6 + 12 * (k + 0.5)
                low, high = (x(min(1.0, max(0.0, as_number(found[end])))) for end in ("low", "high"))
                colour, shape = series(k)
                parts.append(line(low, y, high, y, "whisker"))
                tip = f"{name}, {row['name']}: {_told(found, row['unit'])}"
                parts.append(marker(x(as_number(found["value"])), y, colour, tip, shape=shape))
        return Drawing(height, parts)

    return Chart(
        "What the result can still do, beside its original",
        draw,
        tuple(Entry(name, *series(k)) for k, name in enumerate(names)),
        "Whiskers are 95 % intervals. ▼ and ▲ in the numbers: worse or better than the original beyond chance.",
        ("", *names, "questions", "note"),
        tuple(_cells(row) for row in rows),
    )


def _cells(row: Values) -> tuple[str, ...]:
    first, *others = row["figures"]
    marks = [MARKS[_better(row, k)] for k in range(len(others))]
    told = [_told(found, row["unit"]) + mark for found, mark in zip(others, marks, strict=True)]
    name = f"{row['name']}: {row['variant']}" if row["variant"] else row["name"]
    return (name, _told(first, row["unit"]), *told, str(row["samples"]), row["note"])


def _better(row: Values, result: int) -> bool | None:
    """Whether a result is better than the original, or worse; None where chance may be all."""
    if row["higher_is_better"] is None or not row["differences"]:
        return None
    low, high = (as_number(row["differences"][result][end]) for end in ("low", "high"))
    return (low > 0) == row["higher_is_better"] if low > 0 or high < 0 else None


def _told(found: Values | None, unit: str) -> str:
    """A figure with its interval; shares in percent."""
    if found is None:
        return ""
    value, low, high = (as_number(found[key]) for key in ("value", "low", "high"))
    if not all(map(math.isfinite, (value, low, high))):
        return "not a number"
    if unit == "share":
        return f"{value:.0%} [{low:.0%}, {high:.0%}]".replace("%", " %")
    return f"{number(round(value, 3))} [{number(round(low, 3))}, {number(round(high, 3))}]"


def figures(material: Material) -> dict[str, Chart]:
    """Capabilities of the original and its results."""
    chart = capabilities_chart(material.panel) if material.panel else None
    return {FIGURE: chart} if chart else {}


def _render(material: Material) -> Markup | None:
    panel = material.panel
    if not panel:
        return None
    parts = [figure(chart) for chart in figures(material).values()]
    others = [row for row in panel["rows"] if row["group"] != "capabilities" and not row["variant"]]
    head = ("", *names_of(panel), "questions", "note")
    if others:
        parts.append(
            table(head, map(_cells, others), "Health of what is generated, agreement with the original", fold="")
        )
    if finer := [row for row in panel["rows"] if row["variant"]]:
        parts.append(table(head, map(_cells, finer), "By part and domain", fold="By part and domain"))
    return Markup("").join([*parts, _answers(panel)])


def _answers(panel: Values) -> Markup:
    """The first questions of each capability, with what every model said."""
    asked: dict[str, list[Values]] = {}
    for exchange in panel["exchanges"]:
        asked.setdefault(exchange["capability"], []).append(exchange)
    chosen = [exchange for every in asked.values() for exchange in every[:SHOWN]]
    items = [_exchange(exchange, names_of(panel)) for exchange in chosen]
    fold = "<details><summary>The same questions, answered before and after</summary>{}</details>"
    return Markup(fold).format(Markup("").join(items)) if items else Markup("")


def _exchange(exchange: Values, names: Sequence[str]) -> Markup:
    answer = Markup('<div><dt>{}{}</dt><dd class="answer">{}</dd></div>')
    passed = {True: ", passed", False: ", failed", None: ""}
    said = [
        answer.format(name, passed[each["passed"]], each["text"])
        for name, each in zip(names, exchange["said"], strict=True)
    ]
    whole = '<h3>{}</h3><p class="answer">{}</p><dl class="answers">{}</dl>'
    return Markup(whole).format(exchange["capability"], exchange["prompt"], Markup("").join(said))


SECTION = Section(
    "capabilities",
    "What it can still do",
    _render,
    ("excise evaluate DIR --panel", "capabilities, health of generation and agreement, beside the original's"),
    figures,
)
