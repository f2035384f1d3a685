"""Table and figures of a comparison of criteria."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from excise.report.figures import save_figure
from excise.text import ranges

if TYPE_CHECKING:
    from excise.choosing.compare import Comparison
    from excise.choosing.intervals import Row

MARKERS = "osD^vP*Xhp<>"
HEADERS = ("method", "removed", "energy", "Δ loss [95 %]", "perplexity", "cost (tokens)", "seconds")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One table a budget, lowest loss first; what ties with the best is marked."""
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
        lines += [f"| {_mark(row)} | {' | '.join(_cells(row, repaired))} |" for row in rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def write_comparison_figures(comparison: Comparison, folder: str | Path) -> dict[str, str]:
    """Damage against budget and damage against cost, as PNG and SVG.

    Returns:
        File name of each PNG, relative to the parent of `folder`.

    """
    folder = Path(folder)
    figures = {
        "damage_against_budget": damage_against_budget(comparison),
        "damage_against_cost": damage_against_cost(comparison),
    }
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            save_figure(figure, folder / f"{name}.{suffix}")
    return {name: f"{folder.name}/{name}.png" for name in figures}


def damage_against_budget(comparison: Comparison) -> Figure:
    """Δ loss of every method against M, with 95 % intervals."""
    figure = Figure(figsize=(9.5, 5.4))
    axes = figure.subplots()
    methods = _by_damage(comparison.rows)
    for place, method in enumerate(methods):
        rows = sorted((r for r in comparison.rows if r.method == method), key=lambda r: r.remove)
        below = [max(0.0, r.delta - r.interval[0]) for r in rows]
        above = [max(0.0, r.interval[1] - r.delta) for r in rows]
        axes.errorbar(
            [r.remove + 0.35 * (place / max(1, len(methods) - 1) - 0.5) for r in rows],
            [r.delta for r in rows],
            yerr=[below, above],
            fmt=MARKERS[place % len(MARKERS)] + "-",
            color=_colour(place),
            markersize=4,
            linewidth=1,
            elinewidth=0.7,
            label=method,
        )
    axes.set_xlabel("blocks removed, M")
    axes.set_xticks(sorted({r.remove for r in comparison.rows}))
    _finish(axes, "Damage on held-out text against budget")
    return figure


def damage_against_cost(comparison: Comparison) -> Figure:
    """Δ loss of every method against what choosing cost, one panel a budget."""
    budgets = list(dict.fromkeys(row.remove for row in comparison.rows))
    figure = Figure(figsize=(4.2 * len(budgets) + 2.0, 4.6))
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    methods = _by_damage(comparison.rows)
    for axes, budget in zip(panels, budgets, strict=True):
        for place, method in enumerate(methods):
            points = [(max(1.0, r.forward_equivalents), r.delta) for r in comparison.rows if _is(r, method, budget)]
            axes.plot(*zip(*points, strict=True), MARKERS[place % len(MARKERS)], color=_colour(place), label=method)
        axes.set_xscale("symlog", linthresh=1e3)
        axes.set_xlabel("cost (tokens, forward and backward)")
        _finish(axes, f"M = {budget}", legend=axes is panels[-1])
    return figure


def _is(row: Row, method: str, budget: int) -> bool:
    return row.method == method and row.remove == budget and math.isfinite(row.delta)


def _by_damage(rows: Sequence[Row]) -> list[str]:
    """Methods, the least damaging first (by the mean of log damage over budgets)."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row.method, []).append(math.log(max(row.delta, 1e-3)) if math.isfinite(row.delta) else 9.0)
    return sorted(scores, key=lambda method: sum(scores[method]) / len(scores[method]))


def _colour(place: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["tab20"](place % 20)


def _finish(axes: Axes, title: str, *, legend: bool = True) -> None:
    axes.set_title(title)
    axes.set_yscale("symlog", linthresh=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.3)
    if legend:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.figure.axes[0].set_ylabel("Δ loss (nats/token)")


def _mark(row: Row) -> str:
    if row.behind == 0:
        return "●"
    return "○" if row.behind_interval[0] <= 0 else ""


def _repaired(comparison: Comparison) -> bool:
    return any(row.repaired_delta is not None for row in comparison.rows)


def _headers(repaired: bool) -> tuple[str, ...]:
    place = HEADERS.index("perplexity")
    return (*HEADERS[:place], *(["repaired"] if repaired else []), *HEADERS[place:])


def _cells(row: Row, repaired: bool) -> tuple[str, ...]:
    after = "" if row.repaired_delta is None else f"{row.repaired_delta:+.3f}"
    return (
        row.method,
        _what(row),
        "" if row.energy is None else f"{row.energy:.3g}",
        f"{row.delta:+.3f} [{row.interval[0]:+.2f}, {row.interval[1]:+.2f}]",
        *([after] if repaired else []),
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
