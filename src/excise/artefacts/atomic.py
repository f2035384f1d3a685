"""How a result gets its name: written beside it, flushed to the disk, and renamed.

Whatever is being written lies in a folder of its own beside the final name, `.NAME.….partial`, which holds a file
that its process keeps locked. The lock ends with the process, so what a killed one left is known from what another
process is writing now, on network file systems too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from excise.artefacts.disk import disk_error
from excise.artefacts.lock import HeldError, locked
from excise.errors import ExciseError, OutputError

_LOCK, _OLD = ".lock", ".old"
_discarding: list[bool] = []


@contextlib.contextmanager
def discarding() -> Iterator[None]:
    """Context in which durable results get no name: of several processes that make the same, one writes it."""
    _discarding.append(True)
    try:
        yield
    finally:
        _discarding.pop()


@contextlib.contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on failure it is deleted.

    Works for a file or a folder (create the folder yourself at the yielded path). The suffix is kept, since some
    writers choose their format by it. What `path` held before is put aside first, and deleted only when the new one
    has the name; `clear_leftovers` puts it back if a process dies between the two. If `path` is a link, what it leads
    to is replaced.

    Args:
        path: the final name.
        durable: wait until the disk has it, so that a power cut cannot leave the name with less; not for what is
            checked when it is read and made again if it is damaged.

    Raises:
        OutputError: the disk is full or the place cannot be written.

    """
    final = Path(path)
    if durable and _discarding:
        with tempfile.TemporaryDirectory(prefix="excise-discarded-") as place:
            yield Path(place) / final.name
        return
    try:
        final = final.resolve()
        final.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final path, since a rename is atomic within one file system only.
        holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
        lock = locked(holder / _LOCK) if durable else contextlib.nullcontext()
        try:
            with lock:
                # Under its own name: some writers look at the suffix.
                temporary = holder / final.name
                yield temporary
                _give_usual_rights(temporary, _umask())
                if durable:
                    _flush(temporary)
                _put_in_place(temporary, final, holder / _OLD)
                if durable:
                    _flush_entry(final.parent)
        finally:
            _delete(holder)
    except ExciseError:
        raise
    except Exception as error:
        told = disk_error(error, final)
        if told is None:
            raise
        raise told from error


@contextlib.contextmanager
def replacing(path: str | Path, *, force: bool) -> Iterator[Path]:
    """As `atomic_path`, for a file that carries no key of what made it: without `force`, only the same content goes on.

    Raises:
        OutputError: the file exists and has another content; or see `atomic_path`.

    """
    with atomic_path(path) as temporary:
        yield temporary
        if not force and Path(path).exists() and Path(path).read_bytes() != temporary.read_bytes():
            raise OutputError(
                f"{path} exists with another content; choose another --out, or pass --force to replace it"
            )


def clear_leftovers(path: str | Path) -> None:
    """Delete what dead processes left of writing `path`, and give it back what it held before if it has nothing now.

    Only for who holds the lock of the job that writes there: what is not durable carries no lock of its own.
    """
    final = Path(path).resolve()
    if not final.parent.is_dir():
        return
    for holder in final.parent.glob(f".{_escaped(final.name)}.*.partial"):
        _clear(holder, final)


def clear_leftovers_in(folder: Path) -> None:
    """Delete what dead processes left of writing anything in a folder, at any depth; as `clear_leftovers`."""
    for holder in sorted(folder.rglob(".*.partial")) if folder.is_dir() else ():
        if holder.is_dir():
            # .NAME.RANDOM.partial
            _clear(holder, holder.parent / holder.name[1:].rsplit(".", 2)[0])


def _clear(holder: Path, final: Path) -> None:
    with contextlib.suppress(OSError, HeldError), locked(holder / _LOCK):
        if (holder / _OLD).exists() and not final.exists():
            (holder / _OLD).rename(final)
        _delete(holder)


def _put_in_place(temporary: Path, final: Path, old: Path) -> None:
    """Rename; a folder cannot be renamed onto one that is not empty."""
    if final.is_dir():
        final.rename(old)
        try:
            temporary.rename(final)
        except OSError:
            old.rename(final)
            raise
    else:
        temporary.replace(final)


def _give_usual_rights(path: Path, umask: int) -> None:
    """What the user's umask gives: safetensors writes files that nobody else may read."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            _give_usual_rights(inner, umask)
    usual = (0o777 if path.is_dir() else 0o666) & ~umask
    mode = path.stat().st_mode & 0o7777
    if mode | usual != mode:
        path.chmod(mode | usual)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk hold a file, or a folder and all in it."""
    if path.is_dir():
        for inner in path.iterdir():
            _flush(inner)
        _flush_entry(path)
    elif path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _flush_entry(folder: Path) -> None:
    """Have the disk hold the names in a folder; where the system cannot, there is nothing to be done."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
