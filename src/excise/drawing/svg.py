"""Elements of a chart: markup that reads alike as HTML, in a page, and as XML, in a file.

Every mark carries its values as `data-tip`, for hover. All text goes through markupsafe's escaping.
"""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from excise.drawing.style import SHAPES


def svg(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    """The element for a page; `label` is what screen readers say of it."""
    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}" class="chart">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )


def text(x: float, y: float, content: object, *, anchor: str = "middle", style: str = "tick") -> Markup:
    """A line of text."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, style, content
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, style)


def polyline(points: Iterable[tuple[float, float]], colour: str, style: str = "curve") -> Markup:
    """A line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline points="{}" class="{} stroke-{}"/>').format(through, style, colour)


def rectangle(x: float, y: float, width: float, height: float, colour: str, tip: str) -> Markup:
    """A bar with a tooltip."""
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" class="fill-{}" data-tip="{}"/>'
    ).format(x, y, width, height, colour, tip)


def marker(x: float, y: float, colour: str, tip: str, *, shape: int = 0, extra: Markup | str = "") -> Markup:
    """A point, with a tooltip where there is a `tip`; series differ in shape as well as in colour."""
    r = 5.0
    outlines = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r} {1.3 * r}l{-1.3 * r} {1.3 * r}l{-1.3 * r} {-1.3 * r}z",
        f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r} {2.1 * r}h{-2.4 * r}z",
        f"M{x:.1f} {y + 1.2 * r:.1f}l{1.2 * r} {-2.1 * r}h{-2.4 * r}z",
    )
    told = Markup(' data-tip="{}"').format(tip) if tip else ""
    return Markup('<path d="{}" class="mark fill-{}"{}{}/>').format(outlines[shape % SHAPES], colour, told, extra)


def moved(x: float, y: float, parts: Iterable[Markup]) -> Markup:
    """Parts, shifted."""
    return Markup('<g transform="translate({:.1f} {:.1f})">{}</g>').format(x, y, Markup("").join(parts))
