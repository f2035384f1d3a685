"""Artefacts on disk: written under a temporary name and renamed, so that a final name always holds a whole file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from excise.plain import Facts, Plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance as _Dataclass
else:
    _Dataclass = object

from excise.errors import InputError, OutputError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on failure it is deleted.

    Works for a file or a folder (create the folder yourself at the yielded path). The suffix is kept, since some
    writers choose their format by it.

    Raises:
        OutputError: the disk is full or the place cannot be written.

    """
    final = Path(path)
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final path, since a rename is atomic within one file system only.
        holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
        # Under its own name: some writers look at the suffix.
        temporary = holder / final.name
        try:
            yield temporary
            # A folder cannot be renamed onto one that is not empty.
            if final.is_dir():
                shutil.rmtree(final)
            temporary.replace(final)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
    except OSError as error:
        raise _as_output_error(error, final) from error


def _as_output_error(error: OSError, final: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(final.parent).free / 1e9 if final.parent.exists() else 0.0
        return OutputError(
            f"no space left to write {final} ({free:.2f} GB free); nothing was left there. Free some and run again"
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{final} is larger than files may be there; nothing was left. Choose another place with --out"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputError(f"cannot write {final}: {error.strerror}; choose another place with --out")
    return error


def write_json(path: str | Path, value: Plain) -> None:
    """Write `value` as indented JSON, atomically, as `json_text` gives it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(value, indent=1) + "\n", encoding="utf-8")


def json_text(value: Plain, *, indent: int | None = None) -> str:
    """Return `value` as JSON; NumPy scalars and arrays become plain numbers and lists.

    JSON has neither NaN nor infinity: such a figure becomes null, and `as_number` reads it.

    Raises:
        TypeError: a value of a type that JSON does not know.

    Examples:
        >>> json_text({"loss": float("nan"), "blocks": [0, 2]})
        '{"loss": null, "blocks": [0, 2]}'

    """
    write = partial(json.dumps, indent=indent, default=_plain, ensure_ascii=False, allow_nan=False)
    try:
        return write(value)
    except ValueError:
        return write(json.loads(json.dumps(value, default=_plain), parse_constant=lambda figure: None))


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        InputError: no such file, or not JSON.

    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); it may be from another tool or cut short") from None


def as_number(value: Plain) -> float:
    """A figure from JSON; null, which stands for one that was not finite, becomes NaN."""
    return math.nan if value is None else float(value)


def _plain(value: Plain) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


class Artefact(_Dataclass):
    """Base of dataclasses that are a verb's result: written as JSON and read again."""

    def to_json(self) -> Facts:
        """Plain values by name of field."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write it, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; fields that are not known here are left out.

        Raises:
            InputError: no such file, not JSON, or a field is missing or of another type.

        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path} is no {cls.__name__} of excise: {where}: {first['msg'].lower()}") from None
