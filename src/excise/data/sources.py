"""Rows of text or chat from the starter set, a file, or a data set of the hub; a seeded draw of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from excise.errors import InputError

STARTER = "starter"
SHUFFLE_BUFFER = 10_000
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".txt", ".md")
FORMATS = "`messages`, `conversations` (ShareGPT), `prompt`/`response`, or `text`"
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True)
class Row:
    """One row of a source: `messages` for a chat, else `text`.

    Attributes:
        name: where it stands in the source, for error messages (`data.jsonl:17`).
        messages: list of {"role", "content"}, or None.
        text: plain text, or None.
        category: the row's own `category`, where it has one.

    """

    name: str
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Source:
    """Rows drawn from a place, and what is needed to draw them again.

    Attributes:
        rows: in random order.
        provenance: the place, its hash and the seed.
        is_text_file: the one row is a whole text file, to be cut into windows.

    """

    rows: tuple[Row, ...]
    provenance: Mapping[str, Any]
    is_text_file: bool = False


def draw_rows(data: str, count: int, seed: int) -> Source:
    """Draw `count` rows of chat or text at random.

    Args:
        data: `starter`, a `.jsonl`/`.jsonl.gz`/`.json` lines file, a text file (one row, to be cut into windows later),
            a folder or a hub id (`org/name`), either with `@split` if need be, read as a stream through `datasets`.
        count: rows wanted; fewer come where the source has fewer.
        seed: of the draw.

    Raises:
        InputError: no such file, a row of no known form, broken JSON, or the hub cannot be reached.

    """
    path = Path(data).expanduser()
    if data == STARTER:
        content = resources.files("excise.data").joinpath("starter.jsonl").read_bytes()
        rows = _reservoir(_json_rows(io.BytesIO(content), STARTER), count, seed)
        return Source(rows, {"data": STARTER, "sha256": hashlib.sha256(content).hexdigest(), "seed": seed})
    if path.is_file():
        provenance = {"data": str(data), "sha256": _sha256(path), "seed": seed}
        if _is_json_lines(path):
            return Source(_reservoir(_json_rows(_lines(path), path.name), count, seed), provenance)
        return Source((Row(path.name, text="".join(_lines(path))),), provenance, is_text_file=True)
    if not _folder_of(data).is_dir() and (path.suffix in FILE_SUFFIXES or data.startswith((".", "/", "~"))):
        raise InputError(
            f"no data file {data}; expected 'starter', a .jsonl/.jsonl.gz or text file, or a hub data set id"
        )
    return _from_datasets(data, count, seed)


def row_of(record: Mapping[str, Any], name: str) -> Row:
    """Read one JSON object as a row, whatever of the known forms it has.

    Raises:
        InputError: none of them; names the keys that were there.

    Examples:
        >>> row_of({"conversations": [{"from": "human", "value": "Hi"}]}, "a:1").messages
        ({'role': 'user', 'content': 'Hi'},)

    """
    category = record.get("category") if isinstance(record.get("category"), str) else None
    if isinstance(messages := record.get("messages"), list):
        turns = tuple(_turn(m, "role", "content", name) for m in messages)
        return Row(name, messages=turns, category=category)
    if isinstance(conversations := record.get("conversations"), list):
        keys = (
            ("from", "value")
            if all(isinstance(c, Mapping) and "from" in c for c in conversations)
            else ("role", "content")
        )
        return Row(name, messages=tuple(_turn(c, *keys, name) for c in conversations), category=category)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        turns = ({"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]})
        return Row(name, messages=turns, category=category)
    if isinstance(record.get("text"), str):
        return Row(name, text=record["text"], category=category)
    raise InputError(f"{name}: expected {FORMATS}, got keys {sorted(record)}; rename the fields of your data")


def _turn(message: Any, role_key: str, content_key: str, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or role_key not in message or not isinstance(message.get(content_key), str):
        got = sorted(message) if isinstance(message, Mapping) else type(message).__name__
        raise InputError(f"{name}: each turn needs text fields '{role_key}' and '{content_key}', got {got}")
    role = str(message[role_key])
    return {"role": SHAREGPT_ROLES.get(role, role), "content": message[content_key]}


def _json_rows(stream: Any, name: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{place}: not a JSON object ({error}); expected one JSON object a line") from None
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected a JSON object with {FORMATS}, got {type(record).__name__}")
        yield row_of(record, place)


def _reservoir(rows: Iterator[Row], count: int, seed: int) -> tuple[Row, ...]:
    """Draw uniformly without replacement from a stream, in random order, holding only `count` rows."""
    generator = random.Random(seed)
    kept: list[Row] = []
    for seen, row in enumerate(rows):
        if len(kept) < count:
            kept.append(row)
        elif (place := generator.randint(0, seen)) < count:
            kept[place] = row
    generator.shuffle(kept)
    return tuple(kept)


def _from_datasets(data: str, count: int, seed: int) -> Source:
    import datasets

    name, _, split = data.partition("@")
    split = split or "train"
    if (folder := _folder_of(data)).is_dir():
        name = str(folder)
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
        shuffled = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(count)
        rows = tuple(row_of(record, f"{name}@{split}:{i}") for i, record in enumerate(shuffled))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"cannot read data set '{name}' (split '{split}') through datasets: {type(error).__name__}: {error}. "
            f"Expected 'starter', a file, a folder, or a hub id such as teknium/OpenHermes-2.5; offline, a file"
        ) from error
    fingerprint = hashlib.sha256(repr(rows).encode()).hexdigest()
    provenance = {"data": name, "split": split, "sha256": fingerprint, "seed": seed, "shuffle_buffer": SHUFFLE_BUFFER}
    return Source(rows, provenance)


def _folder_of(data: str) -> Path:
    return Path(data.partition("@")[0]).expanduser()


def _is_json_lines(path: Path) -> bool:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".ndjson", ".json")


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            yield from stream
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); expected a text or JSONL file, plain or .gz") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
