"""The store: whatever a job works out, kept under a key of everything that determines it, and found again.

Another key is another subfolder, so nothing is ever refused or overwritten: a stage that ran out of memory goes on with
a smaller batch, and several models, samples and budgets share one folder. Every file carries the hash of its content;
one that was torn or damaged is worked out anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise.artefacts import atomic_path, read_json, write_json
from excise.errors import InputError, OutputError
from excise.ising.problem import Removal
from excise.plain import Values

# 64 bits: names stay short, and two keys of one folder that share one are out of the question.
DIGITS = 16
# Final hidden states of the intact model: some 100,000 positions of SmolLM2-135M, whose width is 576, in float32.
MEMORY_BYTES = 1 << 28

Arrays = dict[str, np.ndarray]
Key = Values


def digest(value: Any) -> str:
    """SHA-256 of plain data; what JSON does not know is refused, so that nothing enters a key by its printed form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
            kept = read_json(path)
            whole = kept["sha256"] == digest(kept["value"]) and digest(kept["key"]) == digest(key)
        except (InputError, KeyError, TypeError):
            whole = False
        if not whole:
            _tell_damaged(path)
            return None
        return kept["value"]

    def keep(self, kind: str, key: Key, value: Any) -> None:
        """Keep plain data under a key."""
        if self.folder is None:
            self._places[kind, digest(key)] = value
            return
        write_json(
            self.folder / kind / f"{digest(key)[:DIGITS]}.json",
            {"key": key, "value": value, "sha256": digest(value)},
        )


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
        self._memory: dict[int, Arrays] = {}
        if folder is None:
            return
        key_file = folder / "key.json"
        if key_file.exists() and read_json(key_file).get("sha256") != digest(key):
            raise OutputError(
                f"{folder} holds an unfinished run with other settings, another model or other data; "
                f"delete it, or choose another --out"
            )
        _write_key(folder, key)

    def get(self, batch: int) -> Arrays | None:
        """Results of one batch as they were written; None where they were not, or are damaged."""
        if self.folder is None:
            return self._memory.get(batch)
        return _read_arrays(self.path(batch)) if self.path(batch).exists() else None

    def write(self, batch: int, **arrays: np.ndarray) -> None:
        """Keep the results of one batch."""
        if self.folder is None:
            self._memory[batch] = arrays
            return
        _write_arrays(self.path(batch), arrays)

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
    """Every removal ever measured on some samples: sums [samples], in nats over the counted tokens of each.

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
        _write_arrays(path, {"sums": sums, "removals": named})


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
    if not (folder / "key.json").exists():
        write_json(folder / "key.json", {"sha256": digest(key), "key": key})


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={"sha256": _content(whole)})


def _read_arrays(path: Path) -> Arrays | None:
    """Arrays of a file; None, with a warning, where it is not what was written."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            whole = (file.metadata() or {}).get("sha256") == _content(arrays)
    except (SafetensorError, OSError):
        whole = False
    if not whole:
        _tell_damaged(path)
        return None
    return arrays


def _tell_damaged(path: Path) -> None:
    warnings.warn(f"{path} is damaged; what it held is worked out again", stacklevel=3)
