"""A verb's job on the machine: what it reads, where it writes, whether it is done, and that nobody else is at it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from excise import __version__
from excise.artefacts import HeldError, clear_leftovers, clear_leftovers_in, digest, key_of, locked, require_free
from excise.errors import OutputError
from excise.models.file_hashes import sha256_of_each
from excise.plain import Facts, Plain
from excise.settings import declared, plain
from excise.team import launched

# In a folder that is read, what excise and its users add without changing what is computed from it.
_BESIDES = ("README.md", "scores.json", "panel.json", "LICENSE")


@dataclass(frozen=True)
class Job:
    """What the settings of a verb come to.

    Attributes:
        out: what is written; None where nothing is.
        done: it was made by a job with the same key.

    """

    out: Path | None
    done: bool


@contextlib.contextmanager
def starting(settings: Plain) -> Iterator[Job]:
    """Begin a verb's job: check where it writes, clear what dead processes left there, and hold its lock to the end.

    Of several processes that share a job (`torchrun`), the first does so for all.

    Args:
        settings: of the verb; the options with `writes` say what it leaves.

    Raises:
        OutputError: something is in the way, see `excise.artefacts.require_free`; or another process is at it.

    """
    outs = [(setting, getattr(settings, setting.name)) for setting in declared(type(settings)) if setting.option.writes]
    outs = [(setting, out) for setting, out in outs if out is not None]
    if not outs or launched()[0] > 0:
        yield Job(None, False)
        return
    made_by.cache_clear()
    with contextlib.ExitStack() as held:
        opened = [_open(setting.option.writes, out, settings, held) for setting, out in outs]
        recognised = [done for done in opened if done is not None]
        yield Job(outs[0][1], bool(recognised) and all(recognised))


def _open(writes: str, out: Path, settings: Plain, held: contextlib.ExitStack) -> bool | None:
    """Check and lock one place; returns whether it is done, None where what is written carries no key."""
    finishes = hasattr(settings, "force") and writes != "update"
    found = key_of(_artefact(out.expanduser())) if finishes else None
    done = found is not None and not settings.force and found == made_by(settings)
    place = require_free(
        out,
        folder=writes == "workspace" or (writes == "folder" and out.suffix != ".gguf"),
        inputs=_inputs(settings),
        force=done or getattr(settings, "force", False),
        adds=writes in ("workspace", "update"),
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(locked(place.with_name(f".{place.name}.lock")))
    except HeldError as error:
        raise OutputError(f"{out} is in use: {error}. Wait for it, or choose another --out") from None
    work = place.with_name(f".{place.name}.work")
    for written in (place, work):
        clear_leftovers(written)
        clear_leftovers_in(written)
    if done:
        # Killed after its result had its name, and before this was gone.
        shutil.rmtree(work, ignore_errors=True)
    return done if finishes else None


def _artefact(place: Path) -> Path:
    """The file that carries the key."""
    return next((place / name for name in ("run.json", "excise.json") if (place / name).exists()), place)


@lru_cache(maxsize=8)
def made_by(settings: Plain) -> str:
    """Key of everything that determines a verb's result: its settings, and the content of all that it reads.

    Worked out once per job, so that what changes meanwhile does not get the result's key.

    What lies on this machine is known by its bytes, wherever it lies; a hub id by its name.

    Args:
        settings: of a verb.

    """
    facts: Facts = {"excise": __version__, "verb": type(settings).__name__}
    for setting in declared(type(settings)):
        if setting.option.recipe and not setting.option.writes:
            value = getattr(settings, setting.name)
            facts[setting.name] = _content(setting.option.reads, value) if setting.option.reads else plain(value)
    return digest(facts)


def _inputs(settings: Plain) -> list[Path]:
    """Everything on this machine that a verb reads."""
    asked = [(setting, getattr(settings, setting.name)) for setting in declared(type(settings)) if setting.option.reads]
    return [path for setting, value in asked for one in _each(value) for path in _paths(setting.option.reads, one)]


def _each(value: Plain) -> tuple[Plain, ...]:
    return value if isinstance(value, tuple) else () if value in (None, "") else (value,)


def _paths(reads: str, value: str | Path) -> list[Path]:
    if reads == "data":
        from excise.data.sources import local_places

        return local_places(str(value))
    path = Path(value).expanduser()
    return [path] if path.exists() else []


def _content(reads: str, value: Plain) -> Plain:
    """What stands for something to be read, in place of its name."""
    if reads == "data":
        return [_sources(str(one)) for one in _each(value)]
    return [[_hashes(path) for path in _paths(reads, one)] or str(one) for one in _each(value)]


def _sources(data: str) -> Plain:
    """Of each source its share, the short name, which says how it is read, and the content."""
    from excise.data.sources import local_places, name_of, places_of

    places = [(place, local_places(place.data)) for place in places_of(data)]
    return [
        [place.share, name_of(place.data), [_hashes(path) for path in paths]] if paths else [place.share, place.data]
        for place, paths in places
    ]


def _hashes(path: Path) -> Plain:
    if path.is_file():
        return sha256_of_each([path])[0]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_besides(file.relative_to(path))]
    return [[str(file.relative_to(path)), sha] for file, sha in zip(files, sha256_of_each(files), strict=True)]


def _is_besides(inside: Path) -> bool:
    return inside.name in _BESIDES or any(part.startswith(".") for part in inside.parts)
