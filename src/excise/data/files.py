"""The one reader of files of text and of JSON: byte order marks, gzip, and rows that cannot be read."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from excise.errors import InputError
from excise.plain import Values

GZIP = b"\x1f\x8b"
# The longer ones first: the mark of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SUFFIXES = (".jsonl", ".ndjson", ".json")
PEEKED = 1024
BETWEEN = re.compile(r"[\s,]*")


class BadRowError(Exception):
    """A row that cannot be used; the message says why, and leaves the row's name to whoever counts it."""


Parsed = tuple[str, Values | BadRowError]


def is_json(path: Path) -> bool:
    """Whether a file's name says that it holds JSON."""
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def read_text(path: str | Path) -> str:
    """The text of a file, plain or gzip; UTF-8, or as its byte order mark says, which is left out.

    Raises:
        InputError: no such file, damaged, or no text.

    """
    with _opened(Path(path).expanduser()) as stream:
        return _decoded(stream.read())


def read_objects(path: str | Path) -> Iterator[Parsed]:
    """JSON objects of a file, one per line or all in one list, each with its place (`data.jsonl:17`).

    A row that cannot be read comes as the reason, so that one bad row does not cost a file.

    Args:
        path: JSON, plain or gzip; UTF-8, or as its byte order mark says.

    Raises:
        InputError: no such file, or damaged.

    """
    path = Path(path).expanduser()
    with _opened(path) as stream:
        yield from objects_of(stream, path.name)


def objects_of(stream: BinaryIO, name: str) -> Iterator[Parsed]:
    """As `read_objects`, of an open file."""
    start = stream.read(PEEKED)
    stream.seek(0)
    if mark := next((mark for mark, _ in MARKS if start.startswith(mark)), None):
        content = stream.read()
        utf8 = content.removeprefix(mark) if mark == codecs.BOM_UTF8 else _decoded(content).encode("utf-8")
        stream, start = io.BytesIO(utf8), utf8[:PEEKED]
    if start.lstrip().startswith(b"[") and (rows := _list(stream.read())) is not None:
        for place, row in enumerate(rows):
            yield f"{name}[{place}]", row if isinstance(row, BadRowError) else _as_object(row)
        return
    stream.seek(0)
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"{name}:{number}", _parsed(line)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content, gzip undone; what is wrong with the file becomes an error that names it."""
    try:
        with path.open("rb") as plain:
            packed = path.suffix == ".gz" or plain.read(len(GZIP)) == GZIP
            plain.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if packed else plain
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not gzip, or cut short ({error}); expected text, plain or .gz") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); expected a text or JSONL file, plain or .gz") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); expected a text or JSONL file") from error


def _decoded(content: bytes) -> str:
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _list(content: bytes) -> list[Any] | None:
    """A whole file as one list, as far as it can be read; None where its lines are the rows."""
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError):
        rows = _beginning_of_list(content)
    return rows if isinstance(rows, list) and (not rows or any(isinstance(row, dict) for row in rows)) else None


def _beginning_of_list(content: bytes) -> list[Any] | None:
    """What stands in a damaged list before the damage, then the damage; None where the first line is a row."""
    # A byte that is no UTF-8 becomes half a surrogate pair, for which its row alone is refused.
    text = content.decode("utf-8", "surrogateescape").lstrip()
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text.partition("\n")[0])
        return None
    rows: list[Any] = []
    place = cast("re.Match[str]", BETWEEN.match(text, 1)).end()
    while text[place : place + 1] != "]":
        try:
            row, place = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            return [*rows, BadRowError(f"the list is damaged here, what follows is lost ({error})")]
        rows.append(row)
        place = cast("re.Match[str]", BETWEEN.match(text, place)).end()
    return rows


def _parsed(line: bytes) -> Values | BadRowError:
    try:
        return _as_object(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not a JSON object ({error}); expected one JSON object per line")


def _as_object(row: Any) -> Values | BadRowError:
    return row if isinstance(row, dict) else BadRowError(f"expected a JSON object, got {type(row).__name__}")
