"""Whom a run follows: what measured best, what refinement found, or the ground state of an energy."""

from __future__ import annotations

from collections.abc import Sequence

from excise.choosing.candidate import Candidate, Verified
from excise.repair.several import REPAIRED


def chosen_of(verified: Verified, energy: str, select: str) -> Candidate:
    """The candidate to remove: lowest measured loss (repaired, where it was), refinement's winner, or ground state."""
    if select == "measured":
        return verified.best
    if select == "refined":
        return next(c for c in verified.candidates if c.method == "refined:0")
    return next(c for c in verified.candidates if c.method == f"{energy}:0")


def contenders(verified: Verified, energy: str, select: str, racing: int = 1) -> Sequence[Candidate]:
    """Those among whom repair, and a race if there is one, may change the choice; else the choice alone."""
    chosen = chosen_of(verified, energy, select)
    if select != "measured" and racing < 2:
        return [chosen]
    # Repair changes the order: of three in the main job the third became the best (log, 2026-11-24, the main job with
    # repair).
    return verified.ranked[: max(REPAIRED if select == "measured" else 0, racing if racing > 1 else 0)]
