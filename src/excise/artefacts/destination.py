"""Where a result may be written: the one place that says what may be replaced."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from excise.errors import OutputError

# The recipe beside the weights of a checkpoint: what was removed from which model, and how.
RECIPE = "excise.json"
# By these a folder is known to be excise's own: the recipe of a checkpoint, what a finished verb leaves, and the store
# of an unfinished one.
MARKS = (RECIPE, "run.json", "compare.json", "candidates.json", "work")


def require_free(
    out: str | Path, *, folder: bool, inputs: Sequence[str | Path] = (), force: bool = False, adds: bool = False
) -> Path:
    """Refuse to write where something would be lost that nobody agreed to lose; touches nothing.

    A file replaces only a regular file, a folder only one that excise wrote, and both only with `force`. Nothing
    replaces what is being read, or a part of it. A link is followed.

    Args:
        out: the file or folder to be written.
        folder: which of the two.
        inputs: files and folders that are being read.
        force: the user agreed to lose what `out` holds.
        adds: what `out` holds is gone on with: of a folder only single files are replaced, a file is brought up to
            date. Needs no `force`.

    Returns:
        The place itself, links followed.

    Raises:
        OutputError: says what is there and what to do.

    """
    given = Path(out).expanduser()
    place = _followed(given)
    for each in inputs:
        _require_apart(given, place, Path(each).expanduser())
    _require_writable(given, place)
    if not os.path.lexists(place):
        return place
    if folder:
        _require_own_folder(given, place, force or adds)
    else:
        _require_regular(given, place, force or adds)
    return place


def _followed(given: Path) -> Path:
    try:
        place = given.resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{given} is a link that leads in a circle; choose another --out") from error
    if given.is_symlink() and not place.exists():
        raise OutputError(f"{given} is a link to {place}, which does not exist; delete the link, or name {place}")
    return place


def _require_apart(given: Path, place: Path, source: Path) -> None:
    if not source.exists():
        return
    origin = source.resolve()
    if origin == place:
        raise OutputError(f"{given} is what is being read; choose another --out")
    if origin.is_relative_to(place):
        raise OutputError(f"{given} holds {source}, which is being read; choose another --out")
    if place.is_relative_to(origin) and os.path.lexists(place) and not _is_own(place):
        raise OutputError(f"{given} belongs to {source}, which is being read; choose another --out")


def _require_writable(given: Path, place: Path) -> None:
    parent = place.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {given}: {parent} is not a folder you may write to; choose another --out")


def _require_own_folder(given: Path, place: Path, agreed: bool) -> None:
    if not place.is_dir():
        raise OutputError(f"{given} is a file; expected a folder to write, choose another --out")
    if not any(place.iterdir()):
        return
    if not _is_own(place):
        raise OutputError(f"{given} exists and was not written by excise; it is not replaced, choose another --out")
    if not agreed:
        raise OutputError(f"{given} exists; choose another --out, or pass --force to replace it")


def _require_regular(given: Path, place: Path, agreed: bool) -> None:
    if place.is_dir():
        raise OutputError(f"{given} is a folder; expected a file to write, such as {given / 'NAME'}")
    if not stat.S_ISREG(place.stat().st_mode):
        raise OutputError(f"{given} is a device, a pipe or a socket; expected a file to write")
    if not agreed:
        raise OutputError(f"{given} exists; choose another --out, or pass --force to replace it")


def _is_own(place: Path) -> bool:
    return place.is_dir() and any((place / mark).exists() for mark in MARKS)
