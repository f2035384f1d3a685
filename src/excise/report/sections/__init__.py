"""The sections of the page, in their order. To add one: a file here with a `SECTION`, and a line in this list."""

from excise.report.sections import (
    benchmarks,
    budgets,
    capabilities,
    couplings,
    damage,
    domains,
    healing,
    prediction,
    provenance,
    refinement,
    removal,
    speed,
)

SECTIONS = (
    removal.SECTION,
    capabilities.SECTION,
    prediction.SECTION,
    refinement.SECTION,
    budgets.SECTION,
    damage.SECTION,
    domains.SECTION,
    benchmarks.SECTION,
    speed.SECTION,
    healing.SECTION,
    couplings.SECTION,
    provenance.SECTION,
)
