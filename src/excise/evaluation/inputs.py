"""What a benchmark's score depends on beside its settings: the model with its tokenizer, and the resolved task."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.ising.bridges.extras import require
from excise.models.file_hashes import sha256_of, sha256_of_each
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.plain import Facts, Plain, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEHAVIOUR = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy")


def judged_identity(loaded: Loaded) -> str:
    """SHA-256 of all that a judged model brings along: weights and config, tokenizer, chat template, generation config.

    Args:
        loaded: the model, before lm-eval has touched its tokenizer.

    """
    model = loaded.stack.model
    generation = model.generation_config.to_dict() if getattr(model, "generation_config", None) else {}
    generation.pop("transformers_version", None)
    return _digest([model_identity(model), _tokenizer(loaded.tokenizer), generation])


def task_identity(manager: Any, name: str) -> str:
    """SHA-256 of a task as lm-eval resolves it, and of the files that it names.

    Covered are its config with what it includes, for a group or tag those of its members, the Python files beside the
    functions that it names, and local data files. A data set on the hub, or behind another address, is known by its
    name and revision as the task gives them.

    Args:
        manager: an `lm_eval.tasks.TaskManager`.
        name: of a task, group or tag that it knows.

    """
    return _digest(_resolved(manager.task_index, name, ()))


def _resolved(index: Values, name: str, above: tuple[str, ...]) -> Facts:
    entry = index[name]
    config = dict(entry.cfg or {})
    if entry.yaml_path is not None:  # read again, as lm-eval does when it runs the task
        config = require("lm_eval.tasks._yaml_loader", "eval").load_yaml(entry.yaml_path, resolve_func=False)
    code: set[Path] = set()
    plain = _without_places(config, code)
    data = sorted({file for part in _mappings(config) for file in _data_files(part)})
    members = set(entry.tags) if entry.yaml_path is None else set(_members(config))
    return {
        "config": plain,
        "code": [(path.name, sha256_of(path)) for path in sorted(code)],
        "data": sha256_of_each(data),
        "members": {
            member: _resolved(index, member, (*above, name))
            for member in sorted(members & index.keys() - {*above, name})
        },
    }


def _members(config: Values) -> Iterator[str]:
    """Names of a group's tasks and groups, those of the groups that it defines within it too."""
    tasks = config.get("task")
    for item in tasks if isinstance(tasks, list) else ():
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from (item[key] for key in ("task", "group") if isinstance(item.get(key), str))
            yield from _members(item)


def _mappings(value: Plain) -> Iterator[Values]:
    if isinstance(value, Mapping):
        yield value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _mappings(item)


def _without_places(value: Plain, code: set[Path]) -> Any:
    """A config in which functions are named without the folder they lie in; adds the files of their code to `code`."""
    if isinstance(value, Mapping):
        return {str(key): _without_places(item, code) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item, code) for item in value]
    if not (isinstance(value, str) and value.startswith("/")) or "\n" in value:
        return value
    folder, _, function = value.rpartition("/")  # of `!function a.b.f` the loader makes /folder/a.b.f
    module, dot, _ = function.rpartition(".")
    if not dot:
        return value
    path = Path(folder, *module.split(".")).with_suffix(".py")
    if path.is_file():
        code.update(path.parent.glob("*.py"))  # it may import its neighbours
        return function
    if (origin := _installed(module)) is not None:
        code.add(origin)
        return function
    return value


def _installed(module: str) -> Path | None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin and Path(found.origin).is_file() else None


def _data_files(config: Values) -> Iterator[Path]:
    """Local files that `datasets.load_dataset` would read."""
    options = config.get("dataset_kwargs") or {}
    folders = [Path(str(value)) for value in (config.get("dataset_path"), options.get("data_dir")) if value]
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file())
    if (script := Path(str(config.get("dataset_path") or ""))).is_file():
        yield script
    for pattern in _texts(options):
        for base in (Path(), *folders):
            found = map(Path, glob.glob(str(base / pattern), recursive=True))  # noqa: PTH207 (patterns may be absolute)
            yield from (path for path in found if path.is_file())


def _texts(value: Plain) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _texts(item)


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Facts:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        vocabulary = json.loads(backend.to_str())
        # Left behind by whoever called it last.
        vocabulary.update(truncation=None, padding=None)
    else:
        file = getattr(tokenizer, "vocab_file", None)
        vocabulary = [tokenizer.get_vocab(), sha256_of(file) if file else None]
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": vocabulary,
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "longest": tokenizer.model_max_length,
        "behaviour": {name: getattr(tokenizer, name, None) for name in BEHAVIOUR},
    }


def _digest(value: Plain) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
