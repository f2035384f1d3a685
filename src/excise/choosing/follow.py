"""Whom a run follows: what measured best, what refinement found, or the ground state of an energy."""

from __future__ import annotations

from collections.abc import Sequence

from excise.choosing.verify import Candidate, Verified
from excise.errors import InputError
from excise.healing.heal_stage import Healing
from excise.ising.energies import ENERGIES
from excise.repair import repair_stage

SELECT = ("measured", "refined", "energy")


def check_choices(energy: str | None, select: str, effort: float) -> str:
    """Return the energy to show, the default one filled in."""
    if select not in SELECT:
        raise InputError(f"expected select in {', '.join(SELECT)}, got '{select}'")
    if effort < 0:
        raise InputError(f"effort must be 0 (no refinement) or above, got {effort}")
    energy = energy or ("fisher" if select == "energy" or not effort else "fitted")
    known = [*ENERGIES, *(["fitted"] if effort else [])]
    if energy not in known:
        raise InputError(f"expected energy in {', '.join(known)}, got '{energy}'; 'fitted' needs an effort above 0")
    if select == "refined" and not effort:
        raise InputError("select 'refined' needs an effort above 0")
    return energy


def choose(verified: Verified, energy: str, select: str) -> Candidate:
    """The candidate to remove: lowest measured loss (repaired, where it was), refinement's winner, or ground state."""
    if select == "measured":
        return verified.best
    if select == "refined":
        return next(c for c in verified.candidates if c.method == "refined:0")
    return next(c for c in verified.candidates if c.method == f"{energy}:0")


def contenders(verified: Verified, energy: str, select: str, healing: Healing | None) -> Sequence[Candidate]:
    """Those among whom repair, and a race if there is one, may change the choice; else the choice alone."""
    racing = healing.race if healing and healing.race > 1 else 0
    chosen = choose(verified, energy, select)
    if select != "measured" and not racing:
        return [chosen]
    return verified.ranked[: max(repair_stage.REPAIRED if select == "measured" else 0, racing)]
