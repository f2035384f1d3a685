"""Table and figure of a refinement: the race, and how far its energy is to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from excise.drawing.chart import write_charts
from excise.report.sections.refinement import budget_figures
from excise.report.tables import worst_of
from excise.text import ranges

if TYPE_CHECKING:
    from excise.choosing.refine import Refined

TRUSTED = 0.6


def finalists_table(refined: Refined, budget: int, objective: str) -> Table:
    """The race: predicted and measured damage, the winner first."""
    columns = ("removed", f"{objective}, predicted", "measured", "worst domain", "on tokens")
    table = Table(
        *columns, title=f"M = {budget}", caption="on samples that chose among them: the lowest is partly luck"
    )
    for finalist in refined.finalists:
        table.add_row(
            ranges(finalist.removed),
            f"{finalist.predicted:.3f}",
            f"{finalist.damage:.3f} ± {finalist.error:.3f}",
            worst_of(finalist.domains),
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


def distributions_line(refined: Refined) -> str:
    """How distances were taken where not over all tokens of the vocabulary; empty where they were, or none was."""
    facts = refined.distributions
    if not facts.get("top_k"):
        return ""
    return (
        f"distances over the {facts['top_k']:,} tokens most probable to the original, {facts['kept_mass']:.1%} of "
        f"its probability, and all others as one: memory does not hold the whole vocabulary for all positions"
    )


def write_refinement_figures(refined: Refined, budget: int, folder: str | Path) -> dict[str, str]:
    """Draw measured damage against that predicted from all other removals; nothing where nothing was predicted.

    Returns:
        SVG file of each figure, relative to the parent of `folder`.

    """
    return write_charts(budget_figures({budget: refined.to_json()}), folder)
