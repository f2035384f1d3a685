"""The one reader of files of text and of JSON: byte order marks, gzip, and rows that cannot be read."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from excise.errors import InputError

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


class BadRowError(Exception):
    """A row that cannot be used; the message says why, and leaves the row's name to whoever counts it."""


Parsed = tuple[str, Mapping[str, Any] | BadRowError]


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
        stream = io.BytesIO(_decoded(stream.read()).encode("utf-8"))
        start = start.removeprefix(mark) if mark == codecs.BOM_UTF8 else stream.getvalue()[:PEEKED]
    if start.lstrip().startswith(b"[") and (rows := _list(stream.read())) is not None:
        for place, row in enumerate(rows):
            yield f"{name}[{place}]", _as_object(row)
        return
    stream.seek(0)
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"{name}:{number}", _parsed(line)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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
    """A whole file as one list; None where its lines are the rows."""
    try:
        rows = json.loads(content)
    except ValueError:
        return None
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None


def _parsed(line: bytes) -> Mapping[str, Any] | BadRowError:
    try:
        return _as_object(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not a JSON object ({error}); expected one JSON object per line")


def _as_object(row: Any) -> Mapping[str, Any] | BadRowError:
    return row if isinstance(row, dict) else BadRowError(f"expected a JSON object, got {type(row).__name__}")
