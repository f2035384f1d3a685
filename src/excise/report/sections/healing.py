"""Healing: distillation loss by step, and the held-out loss before and after."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from excise.drawing.chart import Chart
from excise.drawing.loss_curves import loss_curves
from excise.plain import Values
from excise.report.html import figure, table
from excise.report.material import Material
from excise.report.section import Section


def figures(material: Material) -> dict[str, Chart]:
    """Training loss of every healed model."""
    chart = loss_curves({name: facts.get("curve", ()) for name, facts in material.healing.items()})
    return {"healing": chart} if chart else {}


def _render(material: Material) -> Markup | None:
    if not material.healing:
        return None
    tables = [_held_out(material.healing), *_by_domain(material.healing)]
    return Markup("").join([*tables, *map(figure, figures(material).values())])


def _held_out(healing: Mapping[str, Values]) -> Markup:
    rows = []
    for name, facts in healing.items():
        losses = facts.get("losses", {})
        original, pruned, healed = (losses.get(key) for key in ("original", "pruned", "healed"))
        known = None not in (original, pruned, healed) and pruned != original
        share = f"{(pruned - healed) / (pruned - original):.0%}" if known else ""
        cells = ("" if loss is None else f"{loss:.4f}" for loss in (original, pruned, healed))
        rows.append((name, *cells, share, facts.get("steps", "")))
    head = ("healed model", "original", "pruned", "healed", "of the damage undone", "steps")
    return table(head, rows, "Loss on held-out text, nats/token", fold="")


def _by_domain(healing: Mapping[str, Values]) -> list[Markup]:
    """A table for each healed model whose held-out samples are of several kinds."""
    tables = []
    for name, facts in healing.items():
        domains = facts.get("domains", {})
        if len(domains.get("healed", {})) < 2:
            continue
        models = [model for model in ("original", "pruned", "healed") if model in domains]
        rows = [
            (kind or "unnamed", *("" if (loss := domains[m].get(kind)) is None else f"{loss:.3f}" for m in models))
            for kind in sorted(domains["healed"])
        ]
        tables.append(table(("domain", *models), rows, f"{name}: loss on held-out text by domain, nats/token"))
    return tables


SECTION = Section(
    "healing",
    "Healing",
    _render,
    ("excise heal DIR/model --teacher MODEL --out DIR/healed", "healing curves"),
    figures,
)
