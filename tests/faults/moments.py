"""Moments of a process: whenever it enters a stage, gets on in it, or changes a file; and in which stage that is."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from excise.progress import Clock, Progress
from tests.faults.kills import is_change


def watching(folder: Path, seen: Callable[[str, int], None]) -> Callable[[], None]:
    """A fault that calls `seen` at every moment, with the names of the stages it is in and its number among theirs.

    Args:
        folder: changes of files in it are moments.
        seen: is called in the process that is watched.

    """
    inside: list[str] = []
    counts: Counter[str] = Counter()

    def moment() -> None:
        # Between stages only files tell of moments, and which process writes first is a matter of time.
        if not inside:
            return
        name = " > ".join(dict.fromkeys(inside))
        counts[name] += 1
        seen(name, counts[name])

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def stage(self: Any, name: str, *arguments: Any) -> Iterator[Any]:
            inside.append(name)
            moment()
            try:
                with plain(self, name, *arguments) as advance:
                    yield None if advance is None else lambda tokens: (advance(tokens), moment())
            finally:
                inside.pop()

        return stage

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if is_change(event, arguments, folder):
            moment()

    def begin() -> None:
        # This process is a fork of the campaign's own, which goes on unwatched.
        for owner in (Clock, Progress):
            owner.stage = watched(owner.stage)  # type: ignore[method-assign]
        sys.addaudithook(listen)

    return begin


def counted(folder: Path, told: Path) -> Callable[[], None]:
    """A fault that only writes the stage of every moment, one a line."""
    place = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def seen(stage: str, number: int) -> None:
        os.write(place, f"{stage}\n".encode())

    return watching(folder, seen)


def killed_at(folder: Path, stage: str, number: int) -> Callable[[], None]:
    """A fault that kills the process at one moment of a stage."""

    def seen(name: str, count: int) -> None:
        if (name, count) == (stage, number):
            os.kill(os.getpid(), signal.SIGKILL)

    return watching(folder, seen)
