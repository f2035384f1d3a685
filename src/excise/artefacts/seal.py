"""The seal of an artefact: a hash of its content, and the version of its format.

In JSON it is a field of the outermost object, in a safetensors file part of the metadata `excise`. A file without one
is another program's, or older than seals, and is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from excise.errors import InputError
from excise.plain import Facts, Plain, Values

SEAL, METADATA = "seal", "excise"
# Entry with the key of what made an artefact, by which a finished job is recognised; see `excise.job.made_by`.
MADE_BY = "made_by"
# Of all artefacts together; a later excise reads what an earlier one wrote, not the other way round.
VERSION = 1
# Stands for the hash of a file while that is worked out: as long as the hash itself.
_BLANK = "0" * 64
_CHUNK = 1 << 20
# safetensors' own limit.
_LONGEST_HEADER = 100_000_000


def digest(value: Plain) -> str:
    """SHA-256 of plain data; what JSON does not know is refused, so that nothing enters a key by its printed form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: Values) -> Facts:
    """Plain data with its seal."""
    bare = {name: entry for name, entry in value.items() if name != SEAL}
    return {**bare, SEAL: {"version": VERSION, "sha256": digest([VERSION, bare])}}


def unsealed(value: Values, path: Path) -> Facts:
    """Plain data without its seal.

    Raises:
        InputError: the content is not what was sealed, or a newer excise sealed it.

    """
    bare = {name: entry for name, entry in value.items() if name != SEAL}
    seal = value.get(SEAL)
    if seal is None:
        return bare
    version, sha = _parts(seal, path)
    if digest([version, bare]) != sha:
        raise _broken(path)
    return bare


def blank(facts: Values) -> dict[str, str]:
    """Metadata of a safetensors file for `stamp` to seal: one entry, since several are written in any order."""
    seal = {"version": VERSION, "sha256": _BLANK}
    return {METADATA: json.dumps({**facts, SEAL: seal}, sort_keys=True)}


def stamp(path: Path) -> None:
    """Seal a safetensors file that was written with the metadata of `blank`: the hash is of all its bytes."""
    at = 8 + _header(path).index(_BLANK.encode())
    with path.open("r+b") as file:
        sha = _sha256(file, at)
        file.seek(at)
        file.write(sha.encode())


def facts_of(path: str | Path) -> Facts:
    """Check the seal of a safetensors file, and return the facts in its metadata without it.

    Raises:
        InputError: no such file, no safetensors file, not what was sealed, or a newer excise sealed it.

    """
    path = Path(path)
    header = _header(path)
    try:
        metadata = json.loads(header).get("__metadata__") or {}
        facts = dict(json.loads(metadata.get(METADATA, "{}")))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or no safetensors file ({error})") from None
    seal = facts.pop(SEAL, None)
    if seal is not None:
        _, sha = _parts(seal, path)
        with path.open("rb") as file:
            if header.count(sha.encode()) != 1 or _sha256(file, 8 + header.index(sha.encode())) != sha:
                raise _broken(path)
    return facts


def key_of(path: str | Path) -> str | None:
    """Key of what made an artefact (JSON, safetensors or GGUF); None where there is none, or none with a key."""
    path = Path(path)
    try:
        if path.suffix == ".gguf":
            import gguf

            facts = {MADE_BY: gguf.GGUFReader(path).fields[f"excise.{MADE_BY}"].contents()}
        elif path.suffix == ".safetensors":
            facts = json.loads(json.loads(_header(path))["__metadata__"][METADATA])
        else:
            facts = json.loads(path.read_text(encoding="utf-8"))
        key = facts[MADE_BY]
    except (OSError, InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return key if isinstance(key, str) else None


def _parts(seal: Plain, path: Path) -> tuple[int, str]:
    try:
        version, sha = seal["version"], seal["sha256"]
    except (KeyError, TypeError):
        raise _broken(path) from None
    if not isinstance(version, int) or not isinstance(sha, str) or len(sha) != len(_BLANK):
        raise _broken(path)
    if version > VERSION:
        raise InputError(
            f"{path} was written by a newer excise (format {version}, this one reads up to {VERSION}): update excise"
        )
    return version, sha


def _broken(path: Path) -> InputError:
    return InputError(
        f"{path} is not what excise wrote: it was damaged or edited. Make it again, or, in JSON that was edited on "
        f"purpose, delete the entry '{SEAL}'"
    )


def _header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header = file.read(length) if length <= min(_LONGEST_HEADER, size - 8) else b""
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not header.startswith(b"{"):
        raise InputError(f"{path} is damaged, or no safetensors file")
    return header


def _sha256(file: BinaryIO, at: int) -> str:
    """Hash of an open file with the blank at one place."""
    file.seek(0)
    sha = hashlib.sha256(file.read(at))
    sha.update(_BLANK.encode())
    file.seek(at + len(_BLANK))
    while chunk := file.read(_CHUNK):
        sha.update(chunk)
    return sha.hexdigest()
