"""Tables and figures of a comparison of criteria."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from excise.drawing.chart import write_charts
from excise.report.sections.damage import comparison_figures
from excise.report.tables import worst_of
from excise.text import markdown_text, ranges

if TYPE_CHECKING:
    from excise.choosing.compare import Comparison
    from excise.choosing.intervals import Row

HEADERS = ("method", "removed", "energy", "Δ loss [95 %]", "worst domain", "perplexity", "cost (tokens)", "seconds")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One table per budget, lowest loss first; what ties with the best is marked."""
    tables = []
    repaired = _repaired(comparison)
    for budget in dict.fromkeys(row.remove for row in comparison.rows):
        table = Table("", *_headers(repaired), title=f"M = {budget}")
        for row in comparison.rows:
            if row.remove == budget:
                table.add_row(_mark(row), *_cells(row, repaired))
        tables.append(table)
    return tables


def comparison_markdown(comparison: Comparison) -> str:
    """The same as Markdown; ● marks the lowest loss, ○ what is not distinguishable from it."""
    parts = []
    repaired = _repaired(comparison)
    headers = _headers(repaired)
    for budget in dict.fromkeys(row.remove for row in comparison.rows):
        lines = [f"### M = {budget}\n", f"| | {' | '.join(headers)} |", "|---" * (len(headers) + 1) + "|"]
        rows = [row for row in comparison.rows if row.remove == budget]
        lines += [f"| {_mark(row)} | {' | '.join(_cells(row, repaired, markdown_text))} |" for row in rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def write_comparison_figures(comparison: Comparison, folder: str | Path) -> dict[str, str]:
    """Draw damage at each budget, against the budget and against cost.

    Returns:
        SVG file of each figure, relative to the parent of `folder`.

    """
    return write_charts(comparison_figures([asdict(row) for row in comparison.rows]), folder)


def _mark(row: Row) -> str:
    if row.behind == 0:
        return "●"
    return "○" if row.behind_interval[0] <= 0 else ""


def _repaired(comparison: Comparison) -> bool:
    return any(row.pruned_delta is not None for row in comparison.rows)


def _headers(repaired: bool) -> tuple[str, ...]:
    place = HEADERS.index("worst domain")
    return (*HEADERS[:place], *(["before repair"] if repaired else []), *HEADERS[place:])


def _cells(row: Row, repaired: bool, named: Callable[[str], str] = str) -> tuple[str, ...]:
    before = "" if row.pruned_delta is None else f"{row.pruned_delta:+.3f}"
    return (
        named(row.method),
        _what(row),
        "" if row.energy is None else f"{row.energy:.3g}",
        f"{row.delta:+.3f} [{row.interval[0]:+.2f}, {row.interval[1]:+.2f}]",
        *([before] if repaired else []),
        named(worst_of(row.domains)),
        f"{row.perplexity:.4g}",
        f"{row.forward_equivalents:,.0f}",
        f"{row.seconds:,.0f}",
    )


def _what(row: Row) -> str:
    if row.draws:
        deltas = [draw["delta"] for draw in row.draws]
        return f"{len(deltas)} draws, {min(deltas):+.2f} to {max(deltas):+.2f}"
    if row.merge:
        return f"{ranges(row.removed)} merged"
    if row.sublayers:
        kinds: dict[str, list[int]] = {}
        for name in row.sublayers:
            block, _, kind = name.partition(".")
            kinds.setdefault(kind, []).append(int(block))
        return "; ".join(f"{kind} {ranges(blocks)}" for kind, blocks in kinds.items())
    return ranges(row.removed)
