"""Whom a run follows: what measured best, what refinement found, or the ground state of an energy."""

from __future__ import annotations

from collections.abc import Sequence

from excise.choosing.candidate import Candidate, Verified
from excise.repair.several import REPAIRED

FIRST_REFINED = tuple(f"refined:{k}" for k in range(REPAIRED))


def chosen_of(verified: Verified, energy: str, select: str) -> Candidate:
    """The candidate to remove: lowest measured loss (repaired, where it was), refinement's winner, or ground state."""
    if select == "measured":
        return verified.best
    if select == "refined":
        return next(c for c in verified.candidates if c.method == "refined:0")
    return next(c for c in verified.candidates if c.method == f"{energy}:0")


def contenders(
    verified: Verified, energy: str, select: str, racing: int = 1, *, after_repair: bool = False
) -> Sequence[Candidate]:
    """Those among whom repair, and a race if there is one, may change the choice; else the choice alone.

    Args:
        verified: as measured without repair.
        energy: shown beside the damage.
        select: see `chosen_of`.
        racing: how many a race takes.
        after_repair: refinement chose by what repair leaves, which damage without repair says little of: its first are
            among them however they measured.

    """
    chosen = chosen_of(verified, energy, select)
    if select != "measured" and racing < 2:
        return [chosen]
    # Repair changes the order: of three in the main job the third became the best (log, 2026-11-24, the main job with
    # repair).
    first = verified.ranked[: max(REPAIRED if select == "measured" else 0, racing if racing > 1 else 0)]
    refined = [c for c in verified.candidates if after_repair and c.method in FIRST_REFINED]
    return list({c.removed: c for c in (*sorted(refined, key=lambda c: c.method), *first)}.values())
