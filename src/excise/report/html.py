"""Parts of the page around its charts: legends, tables, figures, commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from excise.drawing.axes import NARROW, WIDE
from excise.drawing.chart import Chart, Entry
from excise.drawing.svg import marker, svg


def figure(chart: Chart) -> Markup:
    """A chart with its legend, its caption and the table behind it."""
    behind = table(chart.head, chart.rows, chart.label) if chart.rows else ""
    return Markup("<figure>{}{}<figcaption>{}</figcaption></figure>{}").format(
        _legend(chart.entries), responsive(chart), chart.caption, behind
    )


def responsive(chart: Chart) -> Markup:
    """A chart for wide screens and one for narrow ones, on which its text stays legible; style sheets show one."""
    pair = []
    for name, width in (("wide", WIDE), ("narrow", NARROW)):
        drawn = chart.draw(width)
        pair.append(Markup('<div class="{}">{}</div>').format(name, svg(width, drawn.height, chart.label, drawn.parts)))
    return Markup("").join(pair)


def _legend(entries: Sequence[Entry]) -> Markup:
    items = [
        Markup('<li><svg viewBox="0 0 14 14" aria-hidden="true">{}</svg>{}</li>').format(
            marker(7, 7, entry.colour, "", shape=entry.shape), entry.name
        )
        for entry in entries
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items)) if items else Markup("")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str, *, fold: str = "Numbers") -> Markup:
    """Rows of numbers, folded away under the word `fold` or, if that is empty, open."""
    body = [
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup('<th scope="row">{}</th>' if k == 0 else "<td>{}</td>").format(cell)
                for k, cell in enumerate(row)
            )
        )
        for row in rows
    ]
    heads = Markup("").join(Markup('<th scope="col">{}</th>').format(cell) for cell in head)
    whole = Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table><caption>{}</caption>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(caption, caption, heads, Markup("").join(body))
    return Markup("<details><summary>{}</summary>{}</details>").format(fold, whole) if fold else whole


def code(command: str) -> Markup:
    """A command in the text."""
    return Markup("<code>{}</code>").format(escape(command))
