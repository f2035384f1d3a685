"""A chart: drawn at any width for the page, and as a file that is complete in itself."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from excise.artefacts import atomic_path
from excise.drawing.style import file_style
from excise.drawing.svg import marker, moved, text
from excise.errors import InputError

SUFFIX = ".svg"
WIDTH, MARGIN = 720, 20
FONTS = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
# What XML 1.0 has no way to write, not even escaped.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Entry(NamedTuple):
    """A line of a legend: the name of a series, its colour and its shape (a square stands for lines and bars)."""

    name: str
    colour: str
    shape: int = 1


class Drawing(NamedTuple):
    """What is drawn at one width: its height in pixels, and the elements."""

    height: float
    parts: Sequence[Markup]


@dataclass(frozen=True)
class Chart:
    """A figure, apart from where it is shown.

    Attributes:
        label: what it shows: heading of a file, words of a screen reader, caption of the table behind it.
        draw: from a width in pixels to what is drawn.
        entries: of the legend.
        caption: what a reader must know.
        head: of the table behind it.
        rows: of that table.

    """

    label: str
    draw: Callable[[int], Drawing]
    entries: tuple[Entry, ...] = ()
    caption: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()


def svg_file(chart: Chart) -> str:
    """The chart as an SVG document of its own: heading, legend, drawing and caption, light on white.

    It refers to nothing outside itself, and equal charts give equal text.
    """
    drawn = chart.draw(WIDTH)
    top = 0.0
    parts = []
    for words in _wrapped(chart.label, 9.8):
        parts.append(text(0, top + 15, words, anchor="start", style="heading"))
        top += 22
    legend, height = _legend(chart.entries)
    parts += [moved(0, top + 4, legend), moved(0, top + height + 10, drawn.parts)]
    top += height + drawn.height + 14
    for words in _wrapped(chart.caption, 7.0):
        parts.append(text(0, top + 14, words, anchor="start", style="value"))
        top += 18
    width, whole = WIDTH + 2 * MARGIN, round(top + 2 * MARGIN)
    document = Markup(
        '<?xml version="1.0" encoding="UTF-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        'height="{height}" viewBox="0 0 {width} {height}" role="img" font-family="{fonts}" font-size="13">\n'
        "<title>{label}</title>\n<style>\n{style}\n</style>\n"
        '<rect width="{width}" height="{height}" fill="#ffffff"/>\n{content}\n</svg>\n'
    ).format(
        width=width,
        height=whole,
        fonts=FONTS,
        label=chart.label,
        style=Markup(file_style()),
        content=moved(MARGIN, MARGIN, parts),
    )
    return NO_XML.sub("\ufffd", str(document))


def require_svg(path: str | Path) -> None:
    """Refuse a file whose name says that it is no SVG.

    Raises:
        InputError: another suffix.

    """
    if Path(path).suffix.lower() != SUFFIX:
        raise InputError(f"figures are written as {SUFFIX}, got {path}; name it {Path(path).with_suffix(SUFFIX).name}")


def write_chart(chart: Chart, path: str | Path) -> None:
    """Write a chart as a file, atomically.

    Raises:
        InputError: the file is not named `.svg`.
        OutputError: it cannot be written.

    """
    require_svg(path)
    with atomic_path(path) as temporary:
        temporary.write_text(svg_file(chart), encoding="utf-8")


def write_charts(charts: Mapping[str, Chart], folder: str | Path) -> dict[str, str]:
    """Write charts into a folder, each under its name.

    Returns:
        File of each, relative to the parent of `folder`.

    Raises:
        OutputError: one cannot be written.

    """
    folder = Path(folder)
    for name, chart in charts.items():
        write_chart(chart, folder / f"{name}{SUFFIX}")
    return {name: f"{folder.name}/{name}{SUFFIX}" for name in charts}


def _wrapped(words: str, letter: float) -> list[str]:
    """Lines no wider than the drawing, for letters of `letter` pixels on average."""
    return textwrap.wrap(words, int(WIDTH / letter))


def _legend(entries: Iterable[Entry]) -> tuple[list[Markup], float]:
    """The legend in rows, and its height."""
    parts: list[Markup] = []
    x, y, bottom = 0.0, 0.0, 0.0
    for entry in entries:
        # Like the numbers of `_wrapped`, of DejaVu Sans, the widest of FONTS: no font is measured.
        wide = 20 + 7.5 * len(entry.name) + 18
        if x and x + wide > WIDTH:
            x, y = 0.0, y + 20
        parts += [
            marker(x + 7, y + 9, entry.colour, "", shape=entry.shape),
            text(x + 20, y + 13.5, entry.name, anchor="start", style="name"),
        ]
        x, bottom = x + wide, y + 24
    return parts, bottom
