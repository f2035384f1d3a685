"""Where a branch-and-bound search stood when its time ran out, from which another one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int8

from excise.artefacts import digest
from excise.artefacts.arrays import read_arrays, write_arrays
from excise.errors import InputError, reading
from excise.ising.problem import Problem, Removal
from excise.ising.spectrum import masks_of

FORMAT = "excise frontier 1"


@dataclass(frozen=True, eq=False)
class OpenNodes:
    """What is still to be searched, of one number of removed units.

    Attributes:
        bounds: [nodes], lower bounds of the energy of every state below each, without the constant.
        statuses: [nodes, n] of the free units: 1 removed, 0 kept, −1 not decided.

    """

    bounds: Float64[np.ndarray, " nodes"]
    statuses: Int8[np.ndarray, "nodes n"]


@dataclass(frozen=True, eq=False)
class Frontier:
    """Everything from which the proof of a problem can go on.

    Attributes:
        identity: of the problem and the number of states asked for.
        nodes: number removed → what is open; numbers whose search has ended are not in it.
        known: the lowest states known.
        met: those met by the tree search, on which the proof rests.
        visited: nodes of the tree so far.

    """

    identity: str
    nodes: Mapping[int, OpenNodes]
    known: tuple[Removal, ...]
    met: frozenset[Removal]
    visited: int

    def check(self, problem: Problem, states: int) -> None:
        """Refuse another problem.

        Raises:
            InputError: it was left by a search of another problem, or for another number of states.

        """
        if self.identity != identity_of(problem, states):
            raise InputError(
                "this search is of another problem: a search goes on with the same energy, budget, conditions and "
                "number of states. Ask for the same, or begin anew without --continue"
            )

    def save(self, path: str | Path) -> None:
        """Write as safetensors, atomically."""
        counts = sorted(self.nodes)
        units = max((unit for state in self.known for unit in state), default=-1) + 1
        arrays = {f"{count}.bounds": self.nodes[count].bounds for count in counts}
        arrays |= {f"{count}.statuses": self.nodes[count].statuses for count in counts}
        arrays |= {"known": masks_of(self.known, units), "met": np.array([state in self.met for state in self.known])}
        write_arrays(
            path, arrays, {"format": FORMAT, "identity": self.identity, "counts": counts, "visited": self.visited}
        )

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a frontier.

        """
        with reading(path, "what a search left open, which `excise solve --time-limit … --out` writes"):
            arrays, facts = read_arrays(path)
        if facts.get("format") != FORMAT:
            raise InputError(f"{path} is not what a search left open")
        nodes = {m: OpenNodes(arrays[f"{m}.bounds"], arrays[f"{m}.statuses"]) for m in facts["counts"]}
        known = tuple(tuple(np.flatnonzero(mask).tolist()) for mask in arrays["known"])
        met = frozenset(state for state, was_met in zip(known, arrays["met"], strict=True) if was_met)
        return cls(facts["identity"], nodes, known, met, facts["visited"])


def identity_of(problem: Problem, states: int) -> str:
    """Hash of a problem and the number of states asked for."""
    conditions = [[list(c.weights), c.at_least] for c in problem.constraints]
    pattern = None if problem.pattern is None else [list(map(bool, places)) for places in problem.pattern.allowed]
    energy = [problem.energy.h.tolist(), problem.energy.J.tolist()]
    return digest([energy, problem.budget, [*problem.protected], [*problem.forced], conditions, pattern, states])
