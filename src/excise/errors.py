"""Errors a user can act on: each message says what was expected, what came and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class ExciseError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class InputError(ExciseError):
    """A file, option or matrix is not what was expected."""


class ArchitectureError(ExciseError):
    """The model's architecture is unknown, or this model cannot be pruned as asked."""


class CheckpointError(ExciseError):
    """A checkpoint is truncated, corrupt, unsafe or inconsistent with its config."""


class UntestableError(CheckpointError):
    """A checkpoint cannot be tested here, which says nothing against it."""


class SelfTestError(ExciseError):
    """What was written is not what it should be; it was not given its name."""


class OutputError(ExciseError):
    """The result cannot be written: the folder exists, or the disk is full."""


class MissingExtraError(ExciseError):
    """An optional dependency is not installed; the message names the command that installs it."""


class HealingError(ExciseError):
    """Healing cannot go on; the message names the last good checkpoint."""


@contextlib.contextmanager
def reading(place: str | Path, what: str) -> Iterator[None]:
    """Where a file that anybody may have made is read: whatever it makes a library raise becomes an `InputError`.

    Args:
        place: the file, or the folder that it belongs to.
        what: what it was taken for, such as "a tokenizer".

    """
    try:
        yield
    except (ExciseError, MemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")[:300]
        raise InputError(
            f"{place} cannot be read as {what}: {type(error).__name__}: {first}; it is damaged, or from another program"
        ) from error
