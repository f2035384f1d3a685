"""Charts as SVG that follow the page's colours, light and dark: every mark carries its values for hover and readers.

Each chart is drawn twice, for wide and for narrow screens, so that its text stays legible on a phone; style sheets show
one of them. All text goes through markupsafe's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

WIDE, NARROW = 1000, 343
TEXT = 13  # px


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, with its ticks.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: pixel.
        end: pixel.
        logarithmic: whether the scale is.

    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, count: int = 5, *, integers: bool = False) -> list[float]:
        """Round values within the scale, about `count` of them."""
        if self.logarithmic:
            decades = math.log10(self.high / self.low)
            subs = (1.0,) if decades > count else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
            found = LogLocator(subs=subs, numticks=50).tick_values(self.low, self.high)
            return [float(tick) for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]
        found = MaxNLocator(count, integer=integers).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]


def axis(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """A scale over finite values with some room at both ends.

    Args:
        values: at least one.
        start: pixel of the low end.
        end: pixel of the high end.
        zero: whether 0 belongs to the scale.
        log: logarithmic, if all values are positive and they span more than a factor of 30.

    """
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 30:
        return Axis(low / 1.25, high * 1.25, start, end, logarithmic=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - (0 if zero and low == 0 else room), high + (0 if zero and high == 0 else room), start, end)


def number(value: float) -> str:
    """A tick's or a tooltip's number: four significant digits, a true minus sign."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def responsive(draw: Callable[[int], Markup]) -> Markup:
    """A chart for wide screens and one for narrow ones."""
    pair = [
        Markup('<div class="{}">{}</div>').format(name, draw(width))
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    ]
    return Markup("").join(pair)


def svg(width: int, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    """The element; `label` is what screen readers say of it."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart">{}</svg>').format(
        width, f"{height:g}", label, Markup("").join(parts)
    )


def text(x: float, y: float, content: object, *, anchor: str = "middle", style: str = "tick", turn: int = 0) -> Markup:
    """A line of text; `turn` in degrees."""
    turned = Markup(' transform="rotate({} {:.1f} {:.1f})"').format(turn, x, y) if turn else Markup("")
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}"{}>{}</text>').format(
        x, y, anchor, style, turned, content
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, style)


def frame(x: Axis, y: Axis, x_label: str, y_label: str, *, integers: bool = False) -> list[Markup]:
    """Grid, ticks and titles of both axes."""
    narrow = x.end < NARROW
    parts = []
    for tick in y.ticks(4 if narrow else 6):
        parts += [
            line(x.start, y(tick), x.end, y(tick), "grid"),
            text(x.start - 8, y(tick) + 4, number(tick), anchor="end"),
        ]
    for tick in x.ticks(4 if narrow else 8, integers=integers):
        parts += [line(x(tick), y.start, x(tick), y.start + 4, "axis"), text(x(tick), y.start + 19, number(tick))]
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 40, x_label, style="title"))
    parts.append(text(x.start, y.end - 12, y_label, anchor="start", style="title"))
    return parts


def marker(x: float, y: float, colour: str, tip: str, *, shape: int = 0, extra: Markup | str = "") -> Markup:
    """A point with a tooltip; series differ in shape as well as in colour."""
    r = 5.0
    outlines = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r} {1.3 * r}l{-1.3 * r} {1.3 * r}l{-1.3 * r} {-1.3 * r}z",
        f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r} {2.1 * r}h{-2.4 * r}z",
        f"M{x:.1f} {y + 1.2 * r:.1f}l{1.2 * r} {-2.1 * r}h{-2.4 * r}z",
    )
    return Markup('<path d="{}" class="mark" style="--c:var(--{})" data-tip="{}"{}/>').format(
        outlines[shape % len(outlines)], colour, tip, extra
    )


def legend(entries: Sequence[tuple[str, str, int]]) -> Markup:
    """Names of series with their colour and shape."""
    items = [
        Markup('<li><svg viewBox="0 0 14 14" aria-hidden="true">{}</svg>{}</li>').format(
            marker(7, 7, colour, "", shape=shape), name
        )
        for name, colour, shape in entries
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str, *, fold: str = "Numbers") -> Markup:
    """The numbers behind a figure, folded away under the word `fold` or, if that is empty, open."""
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


def figure(content: Markup, caption: str, behind: Markup | str = "") -> Markup:
    """A figure with its caption and the table behind it."""
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>{}").format(content, caption, behind)


def code(command: str) -> Markup:
    """A command in the text."""
    return Markup("<code>{}</code>").format(escape(command))
