"""What results call by short names, in words: who proposed a removal, and which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

REFINED, RANDOM, FITTED = "refined", "random", "fitted"
# Standard errors to either side of a 95 % interval.
Z = 1.96


def proposed_in_words(methods: Sequence[str], certified: Mapping[str, bool]) -> str:
    """Who proposed a removal, the refinement first.

    Args:
        methods: names such as `refined:3`, `fitted:0` or `norm-ratio`; a number is the place in a list, from 0.
        certified: energy → whether the list of its lowest states is proved.

    Examples:
        >>> proposed_in_words(["refined:3", "fitted:0"], {"fitted": True})
        'found by refinement, proved lowest of its energy'
        >>> proposed_in_words(["norm-ratio", "fisher:2"], {"fisher": False})
        'third lowest known of the energy fisher, chosen by norm-ratio'

    """
    named = [method.partition(":") for method in methods]
    refined = any(name == REFINED for name, _, _ in named)
    clauses = {"found by refinement": None} if refined else {}
    # A state of an energy says more than the vote of a criterion.
    for name, _, place in sorted(named, key=lambda parts: parts[0] not in certified):
        if name in certified and place.isdigit():
            clauses[_state(name, int(place), certified[name], own=refined and name == FITTED)] = None
        elif name == RANDOM:
            clauses["drawn at random"] = None
        elif name != REFINED:
            clauses[f"chosen by {name}"] = None
    return ", ".join(clauses)


def _state(energy: str, place: int, proved: bool, *, own: bool) -> str:
    whose = "its energy" if own else f"the energy {energy}"
    rank = f"{_ordinal(place + 1)} lowest" if place else "lowest"
    return f"proved {rank} of {whose}" if proved else f"{rank} known of {whose}"


def _ordinal(number: int) -> str:
    words = {2: "second", 3: "third", 4: "fourth", 5: "fifth"}
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return words.get(number, f"{number}{ending}")


def short_source(source: str) -> str:
    """What a model is called: a hub id in full, of a path its last part, of a run's `model` the last two.

    Examples:
        >>> short_source("org/model"), short_source("/data/runs/small/model"), short_source("a/b/llama.gguf")
        ('org/model', 'small/model', 'llama.gguf')

    """
    path = Path(source).expanduser()
    if not (path.is_absolute() or path.exists() or source.count("/") > 1):
        return source
    return f"{path.parent.name}/{path.name}" if path.name == "model" and path.parent.name else path.name
