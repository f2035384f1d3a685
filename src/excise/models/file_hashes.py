"""SHA-256 of large files, kept between processes by what the file system says of each file.

A hash is found again only while path, size, inode and both times are what they were. The time of the last change of
the inode (ctime) is among them since programs can set the time of modification, and tools that copy do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

from excise.artefacts import atomic_path
from excise.errors import InputError, OutputError

# hashlib leaves the interpreter's lock; more than this a disk seldom feeds.
THREADS = min(4, os.cpu_count() or 1)
# A file written twice within one tick of the file system's clock looks the same after both (git's "racy" entries):
# what changed so lately is hashed again. The coarsest clocks in use, FAT's, tick every 2 s.
SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Stat:
    """What tells that a file was replaced or written to: bytes, nanoseconds since 1970, and the inode's number."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @staticmethod
    def of(path: str | Path) -> Stat:
        """Ask the file system; links are followed.

        Raises:
            InputError: no such file, or not a readable one.

        """
        try:
            found = os.stat(path)  # noqa: PTH116 (one call for a path of either type)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        return Stat(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def cache_folder() -> Path:
    """Where hashes are kept: $EXCISE_CACHE, or `excise` in the user's cache ($XDG_CACHE_HOME, else ~/.cache)."""
    if own := os.environ.get("EXCISE_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "excise"


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits; read only if it is not known for the file as it is now.

    Where the cache cannot be written or is damaged, files are simply hashed again.

    Raises:
        InputError: no such file, or not a readable one.

    """
    real = Path(os.path.realpath(path))
    before = Stat.of(real)
    # One small file for each, so that processes that hash at the same time never undo each other's work.
    entry = cache_folder() / "sha256" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    if (known := _read(entry, real, before)) is not None:
        return known
    now = time.time_ns()
    try:
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if Stat.of(real) == before and max(before.mtime_ns, before.ctime_ns) < now - SETTLED_NS:
        with contextlib.suppress(OutputError, OSError), atomic_path(entry) as temporary:
            value = {"path": os.fsdecode(real), "stat": astuple(before), "sha256": digest}
            temporary.write_text(json.dumps(value), encoding="utf-8", errors="surrogateescape")
    return digest


def sha256_of_each(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """SHA-256 of several files, a few at a time; see `sha256_of`."""
    with ThreadPoolExecutor(THREADS) as pool:
        return tuple(pool.map(sha256_of, paths))


def _read(entry: Path, real: Path, stat: Stat) -> str | None:
    try:
        value = json.loads(entry.read_text(encoding="utf-8", errors="surrogateescape"))
        same = value["path"] == os.fsdecode(real) and value["stat"] == list(astuple(stat))
        digest = value["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if same and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) else None
