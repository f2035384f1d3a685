"""Damage by domain: which kinds of text suffer, before and after repair; and what tied with the choice."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from excise.drawing.axes import signed
from excise.plain import Values
from excise.report.html import table
from excise.report.material import Material
from excise.report.section import Section
from excise.text import ranges


def _render(material: Material) -> Markup | None:
    damage = material.run.get("damage") or {}
    # A run without categories has one domain without a name.
    if len(damage.get("domains", {})) < 2:
        return None
    return Markup("").join(filter(None, [_by_domain(damage), _tied(material.run.get("choice") or {})]))


def _by_domain(damage: Values) -> Markup:
    before: Mapping[str, float | None] = damage.get("pruned_domains", {})
    rows = [
        (name or "unnamed", signed(before.get(name)), signed(after))
        for name, after in sorted(damage["domains"].items(), key=lambda entry: -(entry[1] or 0.0))
    ]
    return table(("domain", "pruned", "as written"), rows, "Δ loss on held-out text that chose nothing", fold="")


def _tied(choice: Values) -> Markup | None:
    tied = choice.get("tied", [])
    if len(tied) < 2:
        return None
    rows = [(ranges(each["removed"]), signed(each["delta"]), signed(each["worst_domain"])) for each in tied]
    return table(("removed", "Δ loss", "worst domain"), rows, "Not told apart by the samples that chose", fold="")


SECTION = Section(
    "domains",
    "Damage by domain",
    _render,
    ("excise run MODEL --remove M --data starter --out DIR", "damage in each category of the held-out samples"),
)
