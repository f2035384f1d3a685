"""A section of the page: one file in `sections/`, one line in its list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from excise.drawing.chart import Chart
from excise.report.material import Material


def _no_figures(material: Material) -> Mapping[str, Chart]:
    return {}


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name: anchor, unique.
        title: heading.
        render: its contents as HTML; None where the folder has nothing for it.
        missing: what adds it, shown in its place then: a command and what it gives.
        figures: its charts, by the names of their files.

    """

    name: str
    title: str
    render: Callable[[Material], Markup | None]
    missing: tuple[str, str]
    figures: Callable[[Material], Mapping[str, Chart]] = _no_figures
