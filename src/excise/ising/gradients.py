"""Per-sample gradients of the loss with respect to the gates, as an artefact: A [samples, gates]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from excise.artefacts import read_arrays, write_arrays
from excise.errors import InputError
from excise.plain import Plain, Values

FORMAT = "excise gradients 1"


@dataclass(frozen=True, eq=False)
class Gradients:
    """A and where it came from.

    Attributes:
        A: [samples, gates], gradient of each sample's mean token cross-entropy (nats) with respect to each gate at 1.
        losses: [samples], that cross-entropy at α = 1.
        gate_blocks: [gates], block of each gate.
        gate_kinds: [gates], kind of its sublayer.
        names: [samples], where each sample came from.
        skipped: names of samples whose loss or gradient was not finite.
        sizes: parameters and bytes of each unit, for budgets in those: {"gates": {"parameters": [gates], "bytes":
            [gates]}, "blocks": {…}}; a block's are more than its sublayers' by its norms.
        provenance: model, data and settings.
        positions: [samples, blocks], y = 1 − α at which each row was taken; None for the intact model.

    """

    A: Float[np.ndarray, "samples gates"]
    losses: Float[np.ndarray, " samples"]
    gate_blocks: tuple[int, ...]
    gate_kinds: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    sizes: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    provenance: Values | None = None
    positions: Float[np.ndarray, "samples blocks"] | None = None

    def blocks(self) -> Float[np.ndarray, "samples blocks"]:
        """Gradients with one gate a block [samples, blocks]: by the chain rule, the sum over its sublayers."""
        columns = np.zeros((self.A.shape[0], max(self.gate_blocks) + 1), dtype=self.A.dtype)
        # Not columns[…] += …, which adds once where an index is repeated, and a block has several gates.
        np.add.at(columns.T, np.array(self.gate_blocks), self.A.T)
        return columns

    def block_kinds(self) -> tuple[str, ...]:
        """Kind of each block [blocks]: those of its sublayers, joined by +."""
        kinds: dict[int, list[str]] = {}
        for block, kind in zip(self.gate_blocks, self.gate_kinds, strict=True):
            kinds.setdefault(block, []).append(kind)
        return tuple("+".join(kinds[block]) for block in sorted(kinds))

    def with_provenance(self, **facts: Plain) -> Gradients:
        """The same gradients with further facts in their provenance."""
        return replace(self, provenance={**(self.provenance or {}), **facts})

    def save(self, path: str | Path, *, key: str | None = None) -> None:
        """Write as safetensors, atomically; `key` is that of what made them."""
        facts = {
            "format": FORMAT,
            "gate_blocks": self.gate_blocks,
            "gate_kinds": self.gate_kinds,
            "names": self.names,
            "skipped": self.skipped,
            "sizes": self.sizes,
            "provenance": self.provenance or {},
        }
        arrays = {"A": self.A, "losses": self.losses}
        if self.positions is not None:
            arrays["positions"] = self.positions
        write_arrays(path, arrays, facts, key=key)

    @staticmethod
    def load(path: str | Path) -> Gradients:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not gradients.

        """
        if not Path(path).is_file():
            raise InputError(f"no gradients file {path}; `excise score` writes one")
        arrays, facts = read_arrays(path)
        if facts.get("format") != FORMAT:
            raise InputError(f"{path} holds no gradients; expected the file that `excise score` writes")
        A, losses, positions = arrays["A"], arrays["losses"], arrays.get("positions")
        blocks, kinds, names, skipped = (tuple(facts[k]) for k in ("gate_blocks", "gate_kinds", "names", "skipped"))
        return Gradients(A, losses, blocks, kinds, names, skipped, facts["sizes"], facts["provenance"], positions)
