"""What one unit of a problem removes: a block, a sublayer, or a block's sublayers of one kind.

Gates are measured once, one a sublayer; a unit is a set of gates, and its gradient the sum of theirs, as it would be
for a single gate they share. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.errors import InputError
from excise.ising.gradients import Gradients

FEED_FORWARD_KINDS = ("feed-forward", "moe")
GRANULARITIES = ("block", "sublayer", "attention", "feed-forward", "kind=KIND")


@dataclass(frozen=True)
class Units:
    """The removable units of a stack at some granularity.

    Attributes:
        granularity: as `units_of` takes it.
        gates: for each unit, its gates, ascending.
        labels: for each unit, its block and, where it is not the whole block, its kinds: "3", "3.attention",
            "3.moe+feed-forward".
        kinds: for each unit, the kinds of its sublayers, joined by +.

    """

    granularity: str
    gates: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.gates)

    def columns(self, A: NDArray[np.floating]) -> NDArray[np.floating]:
        """Gradients with one gate a unit [samples, units], from those with one a sublayer [samples, gates]."""
        return np.stack([A[:, list(gates)].sum(axis=1) for gates in self.gates], axis=1)

    def removed_gates(self, removed: Iterable[int]) -> tuple[int, ...]:
        """Gates [sorted] that a state removing these units sets to 0, as `measure` and `write_pruned` take them."""
        return tuple(sorted(gate for unit in removed for gate in self.gates[unit]))

    def sizes(self, gradients: Gradients) -> dict[str, list[int]]:
        """Parameters and bytes of each unit [units], as far as the gradients know them.

        A block's are more than its sublayers' by its norms.
        """
        known: Mapping[str, Sequence[int]] = gradients.sizes.get("gates", {})
        if self.granularity == "block":
            return {what: list(values) for what, values in gradients.sizes.get("blocks", {}).items()}
        return {what: [sum(values[g] for g in gates) for gates in self.gates] for what, values in known.items()}


def units_of(gate_blocks: Sequence[int], gate_kinds: Sequence[str], granularity: str = "block") -> Units:
    """Group the gates of a stack into units.

    Args:
        gate_blocks: [gates], block of each gate (`Gradients.gate_blocks`, or `sublayer.block` of `Stack.sublayers`).
        gate_kinds: [gates], kind of each gate's sublayer.
        granularity: "block"; "sublayer", every gate apart; "attention" or "feed-forward" (mixtures of experts
            included), a block's sublayers of that kind as one unit; or "kind=moe", likewise of any kind.

    Raises:
        InputError: another granularity, or no gate of that kind.

    Examples:
        >>> units_of([0, 0, 1, 1], ["mamba", "moe", "attention", "moe"], "kind=moe").labels
        ('0.moe', '1.moe')

    """
    indices = range(len(gate_blocks))
    if granularity == "sublayer":
        groups = [[gate] for gate in indices]
    else:
        kinds = _kinds_of(granularity, gate_kinds)
        chosen = [gate for gate in indices if gate_kinds[gate] in kinds]
        if not chosen:
            known = ", ".join(sorted(set(gate_kinds)))
            raise InputError(f"granularity '{granularity}': this model has no such sublayers, only {known}")
        blocks = sorted({gate_blocks[gate] for gate in chosen})
        groups = [[gate for gate in chosen if gate_blocks[gate] == block] for block in blocks]
    names = ["+".join(gate_kinds[gate] for gate in group) for group in groups]
    heads = [str(gate_blocks[group[0]]) for group in groups]
    labels = heads if granularity == "block" else [f"{head}.{name}" for head, name in zip(heads, names, strict=True)]
    return Units(granularity, tuple(map(tuple, groups)), tuple(labels), tuple(names))


def _kinds_of(granularity: str, gate_kinds: Sequence[str]) -> set[str]:
    if granularity == "block":
        return set(gate_kinds)
    if granularity == "attention":
        return {"attention"}
    if granularity == "feed-forward":
        return set(FEED_FORWARD_KINDS)
    prefix, equals, kind = granularity.partition("=")
    if prefix == "kind" and equals and kind:
        return {kind}
    raise InputError(f"expected a granularity in {', '.join(GRANULARITIES)}, got '{granularity}'")
