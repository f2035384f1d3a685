"""What a checkpoint folder holds beside weights and config, and what of it goes along with a pruned one.

A folder is a set: its files name each other. What is carried names nothing that is not.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.artefacts import RECIPE, read_json, write_json
from excise.errors import InputError
from excise.plain import Plain

# Other copies of the weights, in whatever format.
WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".npz", ".xml", ".tflite", ".nemo", ".pdparams",
}  # fmt: skip
WRITTEN_ANEW = {"config.json", "README.md", RECIPE}
# Files that speak of weights or of a training which stay behind, though they name no file of theirs.
LEFT_BEHIND = {
    "heal.json": "it tells of the healing of an earlier checkpoint; excise.json keeps that in its history",
    "params.json": "it describes consolidated weights, which are not carried",
    "trainer_state.json": "it tells of the original's training",
}
FOLDERS = ("additional_chat_templates",)
MODULES = "modules.json"  # of sentence-transformers: what follows the model, each in a folder of its own


@dataclass(frozen=True)
class SideFiles:
    """Files to carry along, as paths inside the folder, and for each JSON file left out the reason."""

    carried: tuple[str, ...]
    left_out: Mapping[str, str]


def side_files(folder: Path) -> SideFiles:
    """Say what goes along with a pruned checkpoint.

    Args:
        folder: the original's.

    """
    top = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    if "heal.json" in top:
        top = [name for name in top if name != "loss.svg"]  # its curve
    carried = [name for name in top if not _is_weights(name) and name not in WRITTEN_ANEW and name not in LEFT_BEHIND]
    left_out = {name: LEFT_BEHIND[name] for name in top if name in LEFT_BEHIND}
    modules, absent = _module_folders(folder) if MODULES in carried else ([], None)
    if absent:
        left_out[MODULES] = f"it names the folder {absent}, which is not there"
        modules = []
    for place in (*FOLDERS, *modules):
        inside = sorted(path for path in (folder / place).rglob("*") if path.is_file())
        carried += [path.relative_to(folder).as_posix() for path in inside]
    for name in carried:
        if elsewhere := _leads_out(folder, name):
            left_out[name] = (
                f"it is a link to {elsewhere}, outside the folder; copy the file if it belongs to the model"
            )
    behind = {name for name in top if _is_weights(name)} | left_out.keys()
    for name in (name for name in carried if name.endswith(".json") and "/" not in name):
        named = sorted(behind.intersection(_texts(_parsed(folder / name))))
        if named:
            left_out[name] = f"it names {named[0]}, which is not carried"
    return SideFiles(tuple(name for name in carried if name not in left_out), left_out)


def _leads_out(folder: Path, name: str) -> Path | None:
    """Where a file really lies, if not in its folder: what is published must not hold what a link leads to by chance.

    The hub's cache keeps a snapshot's files in the `blobs` of the same repository.
    """
    real, home = (folder / name).resolve(), folder.resolve()
    if real.is_relative_to(home):
        return None
    snapshots = home.parent
    in_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return None if in_cache and real.parent == snapshots.parent / "blobs" else real


def carry_along(source: Path, out: Path) -> Mapping[str, str]:
    """Copy what goes along into a new checkpoint's folder; returns what was left out, and why.

    Modules that a JSON file names (`auto_map`) and that the original lacks are no longer named.
    """
    files = side_files(source)
    for name in files.carried:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)
        if name.endswith(".json"):
            before = _parsed(source / name)
            if (after := without_absent_modules(before, files.carried)) != before:
                write_json(out / name, after)
    return files.left_out


def without_absent_modules(value: Plain, present: Collection[str]) -> Any:
    """Return parsed JSON without the references to Python files, in `auto_map` and the like, that are not `present`.

    References to another repository ("org/name--module.Class") stay: the file is to be found there.

    Examples:
        >>> without_absent_modules({"auto_map": {"AutoConfig": "mine.Config", "AutoModel": "lost.Model"}}, ["mine.py"])
        {'auto_map': {'AutoConfig': 'mine.Config'}}

    """
    if isinstance(value, list):
        return [without_absent_modules(entry, present) for entry in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, entry in value.items():
        if key == "auto_map" and isinstance(entry, dict):
            entry = {name: found for name, given in entry.items() if (found := _found(given, present))}
        elif key == "custom_pipelines" and isinstance(entry, dict):
            entry = {k: v for k, v in entry.items() if not isinstance(v, dict) or _found(v.get("impl"), present)}
        else:
            result[key] = without_absent_modules(entry, present)
            continue
        if entry:
            result[key] = entry
    return result


def _found(reference: Any, present: Collection[str]) -> Any:
    """A reference to a class, or for tokenizers a pair of such, as far as its module is there; else None."""
    if isinstance(reference, list):
        pair = [_found(entry, present) for entry in reference]
        return pair if any(pair) else None
    if not isinstance(reference, str) or "--" in reference:
        return reference
    return reference if f"{reference.rpartition('.')[0].replace('.', '/')}.py" in present else None


def _is_weights(name: str) -> bool:
    return Path(name).suffix in WEIGHTS or name.endswith(".index.json")


def _module_folders(folder: Path) -> tuple[list[str], str | None]:
    """Folders that `modules.json` names, and the first of them that is not there or not inside."""
    modules = _parsed(folder / MODULES)
    paths = [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    named = [path for path in paths if isinstance(path, str) and path not in ("", ".")]
    for path in named:
        if not (folder / path).is_dir() or not (folder / path).resolve().is_relative_to(folder.resolve()):
            return [], path
    return named, None


def _parsed(path: Path) -> Any:
    """Parsed JSON; None where it is none, which is carried as it is."""
    try:
        return read_json(path)
    except InputError:
        return None


def _texts(value: Plain) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
