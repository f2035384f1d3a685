"""The panel for the terminal: each capability of the original beside those of its results."""

from __future__ import annotations

from rich.table import Table

from excise.evaluation.panel.panel import Panel
from excise.evaluation.panel.rows import Figure, Row
from excise.report.sections.benchmarks import names_of

MARKS = {"better": " ▲", "worse": " ▼", "": ""}


def panel_table(panel: Panel, *, brief: bool = False) -> Table:
    """One line a row; ▼ and ▲ where a result is worse or better than the original beyond chance.

    Args:
        panel: what was found.
        brief: leave out the parts of capabilities and the domains.

    """
    names = names_of(panel.models)
    table = Table("", "on", *(names[model.hash] for model in panel.models), "note")
    rows = [row for row in panel.rows if not (brief and row.variant)]
    group = rows[0].group if rows else ""
    for row in rows:
        if row.group != group:
            table.add_section()
            group = row.group
        name = f"  {row.variant}" if row.variant else row.name
        table.add_row(name, str(row.samples), *cells(row), row.note)
    return table


def cells(row: Row) -> list[str]:
    """A cell for each model: figure, interval and mark."""
    first, *others = row.figures
    marked = [f"{figure_text(f, row.unit)}{MARKS[row.verdict(number)]}" for number, f in enumerate(others)]
    return [figure_text(first, row.unit), *marked]


def figure_text(figure: Figure | None, unit: str) -> str:
    """A figure with its interval; shares in percent.

    Examples:
        >>> figure_text(Figure(0.5, 0.25, 0.75), "share"), figure_text(Figure(12.0, 8.0, 16.0), "tokens")
        ('50 % [25, 75]', '12.0 [8.0, 16.0]')

    """
    if figure is None:
        return ""
    if unit == "share":
        return f"{figure.value:.0%} [{100 * figure.low:.0f}, {100 * figure.high:.0f}]".replace("%", " %")
    digits = 1 if unit == "tokens" else 2
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
