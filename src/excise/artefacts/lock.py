"""One process at a time: a file that is locked as long as its process lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from excise.artefacts.disk import disk_error
from excise.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no such locks; nothing is locked there.
    fcntl = None  # type: ignore[assignment]


class HeldError(OutputError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which names its holder, and delete it at the end; nothing waits.

    The operating system releases the lock when the process ends, however it ends. Where the file system knows no locks
    (some network ones), nothing is locked.

    Raises:
        HeldError: another process holds it; the message says which.
        OutputError: the file cannot be written.

    """
    try:
        number = _opened(path)
    except OSError as error:
        raise disk_error(error, path) or error from None
    try:
        yield
    finally:
        # While it is held: nobody gets to lock a file whose name is gone, see _opened.
        path.unlink(missing_ok=True)
        os.close(number)


def _opened(path: Path) -> int:
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(number, path)
        except BaseException:
            os.close(number)
            raise
        # Its holder may have deleted the file between our opening and our locking it.
        if os.fstat(number).st_nlink:
            os.ftruncate(number, 0)
            os.write(number, _holder().encode())
            return number
        os.close(number)


def _lock(number: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeldError(f"{path} is held by {_told(os.read(number, 4096))}") from None
    except OSError:
        # No locks on this file system.
        return


def _holder() -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": since, "command": sys.argv})


def _told(content: bytes) -> str:
    try:
        facts = json.loads(content)
        command = " ".join(["excise", *map(str, facts["command"][1:])])
        return f"process {facts['process']} on {facts['machine']} since {facts['since']}: {command}"
    except (ValueError, KeyError, TypeError):
        return "another process"
