"""The store: whatever a job works out, kept under a key of everything that determines it, and found again.

Another key is another subfolder, so nothing is ever refused or overwritten: a stage that ran out of memory goes on with
a smaller batch, and several models, samples and budgets share one folder. Every file carries the hash of its content;
one that was torn or damaged is worked out anew.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from excise.artefacts import Arrays, digest, read_arrays, read_json, write_arrays, write_artefact
from excise.errors import InputError, OutputError
from excise.ising.problem import Removal
from excise.plain import Values

# 64 bits: names stay short, and two keys of one folder that share one are out of the question.
DIGITS = 16
KEY_FILE = "key.json"
# Final hidden states of the intact model: some 100,000 positions of SmolLM2-135M, whose width is 576, in float32.
MEMORY_BYTES = 1 << 28

Key = Values


class Store:
    """Everything that is kept and found again.

    Args:
        folder: where it is kept; None keeps it as long as this object.

    Attributes:
        memory: what is kept from one pass to the next and never written.
        reused_seconds: what the passes had taken that were found here instead of being made again, so far.

    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.memory = Memory()
        self.reused_seconds = 0.0
        # One object per key, so that all who hold a ledger see what the others add.
        self._places: dict[tuple[str, str], Any] = {}

    def place(self, kind: str, key: Key) -> Path | None:
        """Folder for whatever belongs to a key, with the key written in it; None where nothing is written."""
        if self.folder is None:
            return None
        place = self.folder / kind / digest(key)[:DIGITS]
        _write_key(place, key)
        return place

    def journal(self, kind: str, key: Key) -> Journal:
        """Results of batches."""
        return self._opened(f"journal {kind}", key, lambda: Journal(self.place(kind, key), key))

    def ledger(self, kind: str, key: Key) -> Ledger:
        """Measurements of removals."""
        return self._opened(f"ledger {kind}", key, lambda: Ledger(self.place(kind, key)))

    def delete(self, kind: str | None = None) -> None:
        """Forget one kind, or everything."""
        self._places = {} if kind is None else {p: v for p, v in self._places.items() if p[0].split()[-1] != kind}
        if self.folder is not None:
            shutil.rmtree(self.folder / kind if kind else self.folder, ignore_errors=True)

    def _opened(self, kind: str, key: Key, make: Callable[[], Opened]) -> Opened:
        name = (kind, digest(key))
        if name not in self._places:
            self._places[name] = make()
        return self._places[name]

    def found(self, kind: str, key: Key) -> Any | None:
        """Plain data that was kept under a key, or None."""
        if self.folder is None:
            return self._places.get((kind, digest(key)))
        path = self.folder / kind / f"{digest(key)[:DIGITS]}.json"
        if not path.exists():
            return None
        try:
            return read_json(path)["value"]
        except (InputError, KeyError, TypeError):
            _tell_damaged(path)
            return None

    def keep(self, kind: str, key: Key, value: Any) -> None:
        """Keep plain data under a key."""
        if self.folder is None:
            self._places[kind, digest(key)] = value
            return
        path = self.folder / kind / f"{digest(key)[:DIGITS]}.json"
        write_artefact(path, {"key": key, "value": value}, durable=False)


Opened = TypeVar("Opened", "Journal", "Ledger")


class Journal:
    """Results of batches, one small file each, so that an interrupted pass goes on where it stopped.

    Args:
        folder: where the files go; None keeps everything in memory.
        key: everything the results depend on. A folder with another key is refused, which only happens where the user
            names the folder.

    Raises:
        OutputError: the folder holds another job's results.

    """

    def __init__(self, folder: Path | None, key: Key) -> None:
        self.folder = folder
        self._made_by = digest(key)
        self._memory: dict[int, Arrays] = {}
        if folder is None:
            return
        found = _read_key(folder)
        if found is not None and digest(found) != digest(key):
            raise OutputError(
                f"{folder} holds an unfinished run with other settings, another model or other data; "
                f"delete it, or choose another --out"
            )
        _write_key(folder, key)

    def get(self, batch: int) -> Arrays | None:
        """Results of one batch as they were written; None where they were not, or are damaged."""
        if self.folder is None:
            return self._memory.get(batch)
        return _read_arrays(self.path(batch), self._made_by) if self.path(batch).exists() else None

    def write(self, batch: int, **arrays: np.ndarray) -> None:
        """Keep the results of one batch."""
        if self.folder is None:
            self._memory[batch] = arrays
            return
        write_arrays(self.path(batch), arrays, {"journal": self._made_by}, durable=False)

    def delete(self) -> None:
        """Forget everything, once what follows from it is kept elsewhere."""
        self._memory.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, batch: int) -> Path:
        """File of one batch."""
        assert self.folder is not None
        return self.folder / f"batch-{batch:06d}.safetensors"


class Ledger:
    """Every removal ever measured on some samples: sums [samples] of a statistic over the counted tokens of each.

    Args:
        folder: where the measurements go; None keeps them in memory.

    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._entries: dict[Removal, NDArray[np.float64]] = {}
        for path in sorted(folder.glob("part-*.safetensors")) if folder else ():
            part = _read_arrays(path)
            if part is not None:
                removals = json.loads(part["removals"].tobytes())
                self._entries |= zip(map(tuple, removals), part["sums"], strict=True)

    def __contains__(self, removed: Removal) -> bool:
        return removed in self._entries

    def __getitem__(self, removed: Removal) -> NDArray[np.float64]:
        return self._entries[removed]

    def __iter__(self) -> Iterator[Removal]:
        return iter(self._entries)

    def add(self, removals: Sequence[Removal], sums: NDArray[np.float64]) -> None:
        """Keep finished measurements.

        Args:
            removals: [candidates].
            sums: [candidates, samples].

        """
        self._entries |= zip(removals, sums, strict=True)
        if self._folder is None:
            return
        named = np.frombuffer(json.dumps(removals).encode(), dtype=np.uint8)
        # A new file per call, never one rewritten: processes that measure at the same time lose nothing of each
        # other's.
        path = self._folder / f"part-{digest(removals)[:DIGITS]}.safetensors"
        write_arrays(path, {"sums": sums, "removals": named}, durable=False)


class Sized(Protocol):
    """What knows its size, such as a tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


class Memory:
    """What passes leave for each other in memory, at most so many bytes (but always the newest); the oldest go first.

    Args:
        most: bytes.

    """

    def __init__(self, most: int = MEMORY_BYTES) -> None:
        self._most = most
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable) -> Any | None:
        """What was kept under a key, or None."""
        return self._kept.get(key)

    def keep(self, key: Hashable, value: Sized) -> None:
        """Keep something, and forget the oldest while all take too much."""
        self._kept[key] = value
        while len(self._kept) > 1 and sum(value.nbytes for value in self._kept.values()) > self._most:
            self._kept.pop(next(iter(self._kept)))


def _write_key(folder: Path, key: Key) -> None:
    if _read_key(folder) is None:
        write_artefact(folder / KEY_FILE, {"key": key}, durable=False)


def _read_key(folder: Path) -> Key | None:
    path = folder / KEY_FILE
    if not path.exists():
        return None
    try:
        return read_json(path)["key"]
    except (InputError, KeyError, TypeError):
        _tell_damaged(path)
        return None


def _read_arrays(path: Path, journal: str | None = None) -> Arrays | None:
    """Arrays of a file; None, with a warning, where it is not what was written, or not for this journal."""
    try:
        arrays, facts = read_arrays(path)
    except InputError:
        facts = None
    if facts is None or facts.get("journal") != journal:
        _tell_damaged(path)
        return None
    return arrays


def _tell_damaged(path: Path) -> None:
    warnings.warn(f"{path} is damaged; what it held is worked out again", stacklevel=3)
