"""Limits on code that comes with a model: chat templates are programs, and some never end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType

from excise.errors import InputError

SECONDS = 10.0
MEMORY = 1 << 30  # bytes, above what the process has


class _TooLongError(BaseException):
    """No `Exception`: templates may catch those."""


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """A stretch of foreign code that must end within `SECONDS` and take no more than `MEMORY`.

    Time is limited in the main thread and memory on Linux; elsewhere this does nothing.

    Args:
        what: what runs, for the message.

    Raises:
        InputError: it took more.

    """
    try:
        with contextlib.ExitStack() as limits:
            if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
                limits.enter_context(_seconds())
            if Path("/proc/self/statm").exists():
                limits.enter_context(_memory())
            yield
    except _TooLongError:
        raise InputError(f"{what} runs for more than {SECONDS:.0f} s on one text; it may never end") from None
    except MemoryError:
        raise InputError(
            f"{what} takes more than {MEMORY / 1e9:.1f} GB on one text; it is damaged or hostile"
        ) from None


@cache
def require_interruptible(template: str) -> None:
    """Refuse a chat template that raises to powers: no chat needs it, and nothing interrupts Python within 9 ** 9 ** 9.

    Raises:
        InputError: it does.

    """
    from jinja2 import Environment, TemplateError

    try:
        powers = any(kind == "operator" and text == "**" for _, kind, text in Environment().lex(template))
    except TemplateError:
        return  # who compiles it says what is wrong
    if powers:
        raise InputError("the model's chat template raises numbers to powers (**), which no chat needs; remove that")


@contextlib.contextmanager
def _seconds() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    wanted = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _raise(number: int, frame: FrameType | None) -> None:
    raise _TooLongError
