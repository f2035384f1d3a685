"""Rows of text or chat from the starter set, files, folders and the hub; a seeded draw of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from excise.data.files import BadRowError, Parsed, is_json, objects_of, read_objects, read_text
from excise.data.rows import Row, row_of
from excise.errors import InputError
from excise.models.file_hashes import sha256_of
from excise.plain import Values

STARTER = "starter"
# The model's own words, see `prompts_of`.
OWN = "self"
OWN_WORDS = re.compile(rf"{OWN}(?:@([^=]*))?(?:=(.*))?")
# Chats, and plain documents of other kinds of text.
STARTER_FILES = ("starter.jsonl", "documents.jsonl")
SHUFFLE_BUFFER = 10_000
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}  # and the reader of each in datasets
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".txt", ".md", *TABLES)
TOLD = 5  # rows skipped that are told one by one
SHARE = re.compile(r"(.+):(\d*\.?\d+(?:[eE]-?\d+)?)")
EXPECTED = "'starter', a file, a folder, or a hub id such as teknium/OpenHermes-2.5; offline, a file"


@dataclass
class Skipped:
    """Rows that could not be used: how many, and the first few with their reasons."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str, reason: object) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.first) < TOLD:
            self.first.append(f"{name}: {reason}")


@dataclass(frozen=True)
class Place:
    """One source of several, and its share of the samples (all shares together are 1)."""

    data: str
    share: float


@dataclass(frozen=True)
class Source:
    """Rows drawn from a place, and what is needed to draw them again.

    Attributes:
        rows: in random order.
        provenance: the place, its hash and the seed.
        is_text_file: the one row is a whole text file, to be cut into windows.
        skipped: rows that could not be read.
        further: the source's other rows in random order, drawn as they are asked for; once.

    """

    rows: tuple[Row, ...]
    provenance: Values
    is_text_file: bool = False
    skipped: Skipped = field(default_factory=Skipped)
    further: Iterable[Row] = field(default=(), compare=False)


def places_of(data: str) -> tuple[Place, ...]:
    """The sources that an option names: one, or several with commas between them, each with `:SHARE` or none.

    What exists under a name is that file, commas and colons in its name or not. A number after the last colon is a
    share; shares are taken relative to their sum, and are equal where none is given. Of a folder or hub id that stands
    alone it is the configuration, which in a mixture a share or a split must follow: `org/name:2024:1,starter:1` or
    `org/name:2024@train,starter`.

    Raises:
        InputError: a source without a name, some shares given and others not, or a share of 0.

    Examples:
        >>> places_of("starter:1,org/name:config@test:3")
        (Place(data='starter', share=0.25), Place(data='org/name:config@test', share=0.75))
        >>> places_of("org/name:2024")
        (Place(data='org/name:2024', share=1.0),)

    """
    if _stands(data):
        return (Place(data, 1.0),)
    parts = _parts(data)
    names = [_named(part) for part in parts]
    if len(parts) == 1 and _may_be_configured(names[0][0]):
        return (Place(parts[0], 1.0),)
    if not all(name for name, _ in names):
        raise InputError(f"a source without a name in '{data}'; expected sources with commas between them")
    shares = [share for _, share in names if share is not None]
    if shares and len(shares) < len(names):
        missing = next(name for name, share in names if share is None)
        raise InputError(f"'{data}' gives no share for {missing}; expected a share for each source, or for none")
    if any(share <= 0 for share in shares):
        raise InputError(f"'{data}' has a share of 0; leave that source out")
    if len({name for name, _ in names}) < len(names):
        raise InputError(f"'{data}' names a source twice; name it once, with the sum of its shares")
    total = sum(shares) or len(names)
    return tuple(Place(name, (1.0 if share is None else share) / total) for name, share in names)


@dataclass(frozen=True)
class Prompts:
    """What a model is to continue: a source of prompts, and the temperature of its answers, 0 where they are greedy."""

    data: str
    temperature: float = 0.0


def prompts_of(data: str) -> Prompts | None:
    """The prompts of a source in the model's own words; None for another source.

    `self` stands for answers to the starter's prompts, `self=SOURCE` for those to another source's; `self@0.8` and
    `self@0.8=SOURCE` for answers sampled at a temperature of 0.8.

    Raises:
        InputError: no source after the equals sign, or a temperature that is no number of at least 0.

    Examples:
        >>> prompts_of("self"), prompts_of("self@0.8=org/name@test")
        (Prompts(data='starter', temperature=0.0), Prompts(data='org/name@test', temperature=0.8))

    """
    if (match := OWN_WORDS.fullmatch(data)) is None:
        return None
    told, source = match.groups()
    try:
        temperature = 0.0 if told is None else float(told)
    except ValueError:
        temperature = math.nan
    if not (temperature >= 0 and math.isfinite(temperature)) or source == "":
        raise InputError(
            f"expected 'self', 'self=SOURCE', or either with a temperature of at least 0 such as 'self@0.8=SOURCE', "
            f"got '{data}'"
        )
    return Prompts(STARTER if source is None else source, temperature)


def name_of(data: str) -> str:
    """What to call a source in few words: a file without its folder and suffixes, a hub id without its organisation.

    Examples:
        >>> name_of("folder/chats.jsonl.gz"), name_of("org/name:2024@test"), name_of("self=prose.txt")
        ('chats', 'name:2024@test', 'self=prose')

    """
    if prompts_of(data) is not None:
        how, equals, source = data.partition("=")
        return f"{how}={name_of(source)}" if equals else data
    path = Path(data)
    while path.suffix in FILE_SUFFIXES:
        path = path.with_suffix("")
    return path.name or data


def names_of(places: Sequence[Place], taken: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of sources, see `name_of`, none twice and none among those `taken`: `chats`, `chats 2`."""
    found: list[str] = []
    for name in (name_of(place.data) for place in places):
        others = {*taken, *found}
        numbered = (f"{name} {number}" for number in itertools.count(2))
        found.append(next(free for free in itertools.chain([name], numbered) if free not in others))
    return tuple(found)


def asks_model(data: str) -> bool:
    """Whether a source has samples in the model's own words, so that nothing can be drawn before it is loaded."""
    return any(prompts_of(place.data) is not None for place in places_of(data))


def local_places(data: str) -> list[Path]:
    """Files and folders on this machine that an option names; what is shipped and what the hub holds are left out."""
    named = [_read(place.data) for place in places_of(data)]
    folders = [_folder_of(name)[0] for name in named if name != STARTER]
    files = [Path(name).expanduser() for name in named if name != STARTER]
    return [path for path in dict.fromkeys([*files, *folders]) if path.exists()]


def _read(data: str) -> str:
    """The source itself, of prompts where the words are the model's."""
    prompts = prompts_of(data)
    return data if prompts is None else prompts.data


def draw_rows(data: str, count: int, seed: int) -> Source:
    """Draw `count` rows of chat or text at random from one place.

    Rows that cannot be read are skipped and counted.

    Args:
        data: `starter`; a file: JSON lines or one JSON list (.jsonl, .ndjson, .json), a table (.parquet, .csv, .tsv),
            or any other as text (one row, to be cut into windows later), plain or .gz; a folder or a hub id
            (`org/name`), with `:configuration` and `@split` if need be, read through `datasets`.
        count: rows wanted; fewer come where the source has fewer.
        seed: of the draw.

    Raises:
        InputError: no such file, not one row can be read, or the hub cannot be reached.

    """
    path = Path(data).expanduser()
    skipped = Skipped()
    if data == STARTER:
        content = b"".join(resources.files("excise.data").joinpath(name).read_bytes() for name in STARTER_FILES)
        source = _drawn(lambda told: _rows(objects_of(io.BytesIO(content), STARTER), told), count, seed, skipped)
        facts = {"data": STARTER, "sha256": hashlib.sha256(content).hexdigest(), "seed": seed}
        return replace(source, provenance=facts)
    if path.is_file():
        source = _from_file(path, count, seed, skipped)
        source = replace(source, provenance={"data": str(data), "sha256": sha256_of(path), "seed": seed})
    else:
        if not _folder_of(data)[0].is_dir() and (
            path.suffix in FILE_SUFFIXES or data.startswith((".", "/", "~")) or not data.strip()
        ):
            raise InputError(
                f"no data file {data}; expected 'starter', a .jsonl, table or text file (plain or .gz), a folder, or a "
                f"hub data set id"
            )
        source = _from_datasets(data, count, seed, skipped)
    if not source.rows and skipped.rows:
        raise InputError(f"none of the {skipped.rows} rows of '{data}' can be read: {skipped.first[0]}")
    return source


def _parts(data: str) -> list[str]:
    """Split at commas, but not within the name of a file that exists."""
    pieces, parts = data.split(","), []
    while pieces:
        taken = next((n for n in range(len(pieces), 1, -1) if _is_known(",".join(pieces[:n]).strip())), 1)
        parts.append(",".join(pieces[:taken]).strip())
        pieces = pieces[taken:]
    return parts


def _named(part: str) -> tuple[str, float | None]:
    """A source and its share."""
    match = None if _stands(part) else SHARE.fullmatch(part)
    return (part, None) if match is None else (match[1], float(match[2]))


def _may_be_configured(name: str) -> bool:
    """Whether it is a folder or a hub id, and names no configuration or split yet."""
    name = _read(name)
    path = Path(name).expanduser()
    is_file = name == STARTER or path.is_file() or path.suffix in FILE_SUFFIXES
    return bool(name) and not is_file and not set(name) & set(":@")


def _is_known(part: str) -> bool:
    return _stands(_named(part)[0])


def _stands(data: str) -> bool:
    return data == STARTER or (
        bool(data.strip()) and (Path(data).expanduser().exists() or _folder_of(data)[0].is_dir())
    )


def _from_file(path: Path, count: int, seed: int, skipped: Skipped) -> Source:
    if is_json(path):
        return _drawn(lambda told: _rows(read_objects(path), told), count, seed, skipped)
    if reader := _table_reader(path):
        return _drawn(lambda told: _rows(_records(path, reader), told), count, seed, skipped)
    return Source((Row(path.name, text=read_text(path)),), {}, is_text_file=True)


def _table_reader(path: Path) -> str | None:
    return TABLES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _records(path: Path, reader: str) -> Iterator[Parsed]:
    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}  # the reader of CSV takes it
    records = _streamed(path.name, None, reader, data_files=str(path), split="train", **options)
    for i, record in enumerate(_guarded(records, path.name, None)):
        yield f"{path.name}[{i}]", record


def _rows(parsed: Iterable[Parsed], skipped: Skipped) -> Iterator[Row]:
    for name, record in parsed:
        try:
            if isinstance(record, BadRowError):
                raise record
            yield row_of(record, name)
        except BadRowError as reason:
            skipped.add(name, reason)


def _drawn(read: Callable[[Skipped], Iterator[Row]], count: int, seed: int, skipped: Skipped) -> Source:
    """Rows of what can be read more than once; `read` counts what cannot be used."""
    rounds = _rounds(read, count, random.Random(seed), skipped)
    return Source(next(rounds), {}, skipped=skipped, further=itertools.chain.from_iterable(rounds))


def _rounds(
    read: Callable[[Skipped], Iterator[Row]], count: int, generator: random.Random, skipped: Skipped
) -> Iterator[tuple[Row, ...]]:
    """Draws of `count` rows, then of twice as many each time, no row twice, until none are left."""
    taken: set[int] = set()
    while True:
        others = ((place, row) for place, row in enumerate(read(skipped)) if place not in taken)
        drawn = _reservoir(others, count, generator)
        yield tuple(row for _, row in drawn)
        if len(drawn) < count:
            return
        taken.update(place for place, _ in drawn)
        # The first reading has counted all.
        count, skipped = 2 * count, Skipped()


def _reservoir(rows: Iterator[tuple[int, Row]], count: int, generator: random.Random) -> list[tuple[int, Row]]:
    """Draw uniformly without replacement from a stream, in random order, holding only `count` rows."""
    kept: list[tuple[int, Row]] = []
    for seen, row in enumerate(rows):
        if len(kept) < count:
            kept.append(row)
        elif (place := generator.randint(0, seen)) < count:
            kept[place] = row
    generator.shuffle(kept)
    return kept


def _from_datasets(data: str, count: int, seed: int, skipped: Skipped) -> Source:
    """A folder's files of JSON go through the reader of files, bad rows and all; the rest is streamed."""
    folder, configuration, split = _folder_of(data)
    is_folder, name = folder.is_dir(), str(folder)
    facts = {"data": name, "split": split, "seed": seed}
    if configuration is not None:
        facts["configuration"] = configuration
    if is_folder and (files := _files_of_json(name, configuration, split)):
        source = _drawn(
            lambda told: _rows((row for file in files for row in read_objects(file)), told), count, seed, skipped
        )
        digest = hashlib.sha256("".join(sha256_of(Path(file)) for file in files).encode()).hexdigest()
        return replace(source, provenance={**facts, "sha256": digest})
    stream = _streamed(name, split, name, configuration, split=split)
    shuffled = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    named = ((f"{name}@{split}:{i}", record) for i, record in enumerate(_guarded(shuffled, name, split)))
    usable = _rows(named, skipped)
    rows = tuple(itertools.islice(usable, count))
    fingerprint = hashlib.sha256(repr(rows).encode()).hexdigest()
    facts |= {"sha256": fingerprint, "shuffle_buffer": SHUFFLE_BUFFER}
    return Source(rows, facts, skipped=skipped, further=usable)


def _files_of_json(name: str, configuration: str | None, split: str) -> list[str]:
    """The files of a folder's split where they hold JSON, sorted; empty where another format needs `datasets`."""
    import datasets

    with _as_input_error(name, split):
        builder = datasets.load_dataset_builder(name, configuration)
        files = dict(builder.config.data_files or {})
        if files and split not in files:
            raise ValueError(
                f"it has the splits {', '.join(map(str, files))}; name one as '{name}@{next(iter(files))}'"
            )
    paths = sorted(str(file) for file in files.get(split, ()))
    return paths if paths and all(is_json(Path(path)) and Path(path).is_file() for path in paths) else []


def _streamed(place: str, told: str | None, /, *arguments: Any, **options: Any) -> Any:
    import datasets

    with _as_input_error(place, told):
        return datasets.load_dataset(*arguments, streaming=True, **options)


def _guarded(stream: Iterable[Any], name: str, split: str | None) -> Iterator[Any]:
    with _as_input_error(name, split):
        yield from stream


@contextlib.contextmanager
def _as_input_error(name: str, split: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever datasets, its readers and the hub raise
        place = f"'{name}'" if split is None else f"'{name}' (split '{split}')"
        hint = "" if "onfig name is missing" not in str(error) else f". Name one as '{name}:CONFIGURATION'"
        raise InputError(
            f"cannot read data set {place} through datasets: {type(error).__name__}: {error}{hint}. Expected {EXPECTED}"
        ) from error


def _folder_of(data: str) -> tuple[Path, str | None, str]:
    """Folder or hub id, configuration and split of `name`, `name:configuration`, `name@split`, or both."""
    if Path(data).expanduser().is_dir():
        return Path(data).expanduser(), None, "train"
    whole, _, split = data.partition("@")
    if Path(whole).expanduser().is_dir():
        return Path(whole).expanduser(), None, split or "train"
    name, _, configuration = whole.partition(":")
    return Path(name).expanduser(), configuration or None, split or "train"
