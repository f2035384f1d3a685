"""JSON as every program reads it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from excise.artefacts.atomic import atomic_path
from excise.artefacts.seal import MADE_BY, sealed, unsealed
from excise.errors import InputError
from excise.plain import Plain, Values


def write_json(path: str | Path, value: Plain) -> None:
    """Write a file for other programs as indented JSON, atomically.

    Infinity and NaN are written by these names, as Python's own reader and transformers' configs have them.
    """
    text = json.dumps(value, indent=1, default=_plain, ensure_ascii=not _is_text(value))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_artefact(path: str | Path, value: Values, *, key: str | None = None, durable: bool = True) -> None:
    """Write a result of ours: strict JSON (see `json_text`), with the seal that `read_json` checks.

    Args:
        path: the file.
        value: its content.
        key: of what made it.
        durable: see `atomic_path`.

    """
    content = sealed(json.loads(json_text({**value, **({} if key is None else {MADE_BY: key})})))
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")


def json_text(value: Plain, *, indent: int | None = None) -> str:
    """Return `value` as JSON; NumPy scalars and arrays become plain numbers and lists.

    JSON has neither NaN nor infinity: such a figure becomes null, and `as_number` reads it.

    Raises:
        TypeError: a value of a type that JSON does not know.

    Examples:
        >>> json_text({"loss": float("nan"), "blocks": [0, 2]})
        '{"loss": null, "blocks": [0, 2]}'

    """
    write = partial(json.dumps, indent=indent, default=_plain, ensure_ascii=not _is_text(value), allow_nan=False)
    try:
        return write(value)
    except ValueError:
        return write(json.loads(json.dumps(value, default=_plain), parse_constant=lambda figure: None))


def read_json(path: str | Path) -> Any:
    """Read JSON; the seal of a result of ours is checked and left out.

    Raises:
        InputError: no such file, not JSON, or not what was sealed.

    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); it may be from another tool or cut short") from None
    return unsealed(value, path) if isinstance(value, dict) else value


def as_number(value: Plain) -> float:
    """A figure from JSON; null, which stands for one that was not finite, becomes NaN."""
    return math.nan if value is None else float(value)


def _is_text(value: Plain) -> bool:
    """Whether UTF-8 has all its characters: not half a surrogate pair, as in some names of files and rows of data."""
    try:
        json.dumps(value, default=_plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Plain) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
