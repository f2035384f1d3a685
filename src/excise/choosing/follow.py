"""Whom a run follows: what measured best, what refinement found, or the ground state of an energy."""

from __future__ import annotations

from collections.abc import Sequence

from excise.choosing.candidate import Candidate, Verified
from excise.repair.several import REPAIRED

# Beside the best of the others: the race of refinement has told its finalists apart on more tokens.
FIRST_REFINED = ("refined:0", "refined:1")


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
        after_repair: refinement chose by what repair leaves, of which damage without repair says little: its first two
            are among them however they measured.

    """
    chosen = chosen_of(verified, energy, select)
    if select != "measured" and racing < 2:
        return [chosen]
    # Repair changes the order: of three in the main job the third became the best (log, 2026-11-24, the main job with
    # repair).
    most = max(REPAIRED if select == "measured" else 0, racing if racing > 1 else 0)
    refined = [c for c in verified.candidates if after_repair and c.method in FIRST_REFINED]
    wanted = {c.removed: c for c in (*sorted(refined, key=lambda c: c.method), *verified.ranked)}
    return list(wanted.values())[:most]
