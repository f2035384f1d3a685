"""Table and figure of a refinement: the race, and how far its energy is to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from excise.report.figures import CHOSEN, COLOURS, OURS, save_figure
from excise.text import ranges

if TYPE_CHECKING:
    from excise.choosing.refine import Refined

TRUSTED = 0.6


def finalists_table(refined: Refined, budget: int, objective: str) -> Table:
    """The race: predicted and measured damage, the winner first."""
    table = Table("removed", f"{objective}, predicted", "measured", "on tokens", title=f"M = {budget}")
    for finalist in refined.finalists:
        table.add_row(
            ranges(finalist.removed),
            f"{finalist.predicted:.3f}",
            f"{finalist.damage:.3f} ± {finalist.error:.3f}",
            f"{finalist.tokens:,}",
            style="bold green" if finalist.removed == refined.removed else None,
        )
    return table


def trust_line(refined: Refined) -> str:
    """How well the energy ranked what it had not been fitted to; says so where that is badly."""
    shown = {"random removals": refined.random_rho, "removals it proposed": refined.low_rho}
    parts = [f"{name} {rho:.2f}" for name, rho in shown.items() if rho is not None]
    doubtful = any(rho is not None and rho < TRUSTED for rho in shown.values())
    advice = "; below 0.6 its order says little: raise --effort, or rely on the measured damage" if doubtful else ""
    return (
        f"energy against measured damage, not fitted to: Spearman ρ on "
        f"{', on '.join(parts) or 'too few removals'}{advice} "
        f"({len(refined.search.damages)} removals measured, {refined.forward_tokens:,.0f} forward tokens, "
        f"{refined.seconds:.0f} s)"
    )


def save_predictions(refined: Refined, path: str | Path) -> None:
    """Write the figure of predicted against measured damage."""
    save_figure(predictions(refined), Path(path))


def predictions(refined: Refined) -> Figure:
    """Damage predicted before it was measured, against measured: what the loop proposed, and random removals."""
    figure = Figure(figsize=(5.6, 4.8))
    axes = figure.subplots()
    proposed = [pair for r in refined.search.rounds for pair in zip(r.predicted, r.measured, strict=True)]
    for points, colour, name, rho in (
        (refined.anchors, COLOURS["random"], "random", refined.random_rho),
        (proposed, OURS, "proposed by the loop", refined.low_rho),
    ):
        if points:
            label = name if rho is None else f"{name}, ρ = {rho:.2f}"
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=22, alpha=0.8, color=colour, label=label)
    values = np.array([value for pair in [*proposed, *refined.anchors] for value in pair])
    ends = [float(np.nanmin(values)), float(np.nanmax(values))] if len(values) else [0.0, 1.0]
    axes.plot(ends, ends, color=CHOSEN, linewidth=0.8)
    axes.set_xlabel("predicted damage (nats)")
    axes.set_ylabel("measured damage (nats)")
    axes.set_title("Predicted before measured")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
