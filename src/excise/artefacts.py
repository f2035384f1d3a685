"""Artefacts on disk: written under a temporary name and renamed, so that a final name always holds a whole file."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NumPy scalars and arrays become plain numbers and lists."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=_plain, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


class Artefact(_Dataclass):
    """Base of dataclasses that are a verb's result: written as JSON and read again."""

    def to_json(self) -> dict[str, Any]:
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
