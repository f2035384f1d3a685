"""The ledger of measurements: every removal ever measured on some samples, kept on disk and never measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise.artefacts import atomic_path, write_json
from excise.errors import OutputError
from excise.measuring.journal import Journal

Removal = tuple[int, ...]
DIGITS = 16


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known of one removal.

    Attributes:
        sums: [samples], nats summed over the counted tokens of each sample.
        tokens: what measuring it cost, in tokens through the whole intact stack.

    """

    sums: NDArray[np.float64]
    tokens: float


class Ledger:
    """Measurements of removals on one set of samples, in a folder that other models and samples may share.

    Every set of samples, model and statistic has a subfolder of its own, named after what determines its values.

    Args:
        folder: where the subfolders go; None keeps nothing beyond this object.
        key: everything the values depend on.

    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self._entries: dict[Removal, Entry] = {}
        self._folder: Path | None = None
        if folder is None:
            return
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self._folder = folder / digest[:DIGITS]
        self._key = {**key, "sha256": digest}
        for path in sorted(self._folder.glob("part-*.safetensors")):
            self._entries |= _read(path)

    def __contains__(self, removed: Removal) -> bool:
        return removed in self._entries

    def __getitem__(self, removed: Removal) -> Entry:
        return self._entries[removed]

    def __iter__(self) -> Iterator[Removal]:
        return iter(self._entries)

    def journal(self, removals: Sequence[Removal]) -> Journal:
        """Journal of a measurement under way, so that it goes on where it was interrupted."""
        if self._folder is None:
            return Journal(None, {})
        return Journal(self._folder / f"unfinished-{_digest(removals)}", {**self._key, "removals": removals})

    def add(self, removals: Sequence[Removal], sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> None:
        """Keep finished measurements, and delete their journal.

        Args:
            removals: [candidates].
            sums: [candidates, samples].
            tokens: [candidates], cost of each.

        """
        self._entries |= {r: Entry(s, float(t)) for r, s, t in zip(removals, sums, tokens, strict=True)}
        if self._folder is None:
            return
        if not (self._folder / "key.json").exists():
            write_json(self._folder / "key.json", self._key)
        with atomic_path(self._folder / f"part-{_digest(removals)}.safetensors") as temporary:
            save_file(
                {"sums": np.ascontiguousarray(sums), "tokens": tokens},
                temporary,
                metadata={"removals": json.dumps(removals)},
            )
        self.journal(removals).delete()


def _digest(removals: Sequence[Removal]) -> str:
    return hashlib.sha256(json.dumps(removals).encode()).hexdigest()[:DIGITS]


def _read(path: Path) -> dict[Removal, Entry]:
    try:
        with safe_open(path, framework="np") as file:
            removals = json.loads(file.metadata()["removals"])
            sums, tokens = file.get_tensor("sums"), file.get_tensor("tokens")
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise OutputError(f"{path} is damaged ({error}); delete it, and it is measured again") from None
    return {tuple(r): Entry(s, float(t)) for r, s, t in zip(removals, sums, tokens, strict=True)}
