"""Being told to stop: Ctrl-C, and SIGTERM as SLURM, Kubernetes and systemd send it.

Both raise in the main thread. An exception that is raised while foreign code calls back may be swallowed there; the
loops over batches therefore ask again.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came."""


INTERRUPTED, TERMINATED = 130, 143

_told: list[type[KeyboardInterrupt]] = []


def listen() -> None:
    """Have both signals raise from now on; for programs, not for libraries."""
    if threading.current_thread() is threading.main_thread():
        _told.clear()
        signal.signal(signal.SIGINT, _raise)
        signal.signal(signal.SIGTERM, _raise)


def stop_if_told() -> None:
    """Raise again what was raised before and lost.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        TerminatedError: SIGTERM came.

    """
    if _told:
        raise _told[-1]


def said(told: KeyboardInterrupt) -> int:
    """Say in one line that the program was told to stop; returns its exit status."""
    print("interrupted; the same command goes on where it stopped", file=sys.stderr)  # noqa: T201
    return TERMINATED if isinstance(told, TerminatedError) else INTERRUPTED


def _raise(number: int, frame: FrameType | None) -> None:
    _told.append(TerminatedError if number == signal.SIGTERM else KeyboardInterrupt)
    raise _told[-1]
