"""Recipes: settings of a verb as a file."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from excise.artefacts import read_json
from excise.errors import InputError
from excise.plain import Facts, Plain, Values
from excise.settings import Setting, declared, make, plain, values_of

# YAML 1.1, which PyYAML reads, takes 1e-4 for a text; everyone else takes it for a number.
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def read_recipe(cls: type, path: Path) -> Facts:
    """Values by name of field from YAML, JSON, or an artefact that holds them as its "settings".

    Args:
        cls: the dataclass of the settings.
        path: the file; relative paths in it are relative to the working directory, as on the command line.

    Raises:
        InputError: no such file, it holds something else, or an unknown setting or a value of another type.

    """
    found = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if isinstance(found, Mapping) and isinstance(found.get("settings"), Mapping):
        found = found["settings"]
    if not isinstance(found, Mapping):
        raise InputError(f"{path} is no recipe: expected settings by name, such as 'seed: 0', got {_brief(found)}")
    return values_of(cls, found, str(path))


def recipe_text(cls: type, values: Values) -> str:
    """All settings as YAML, each below its help; those that are required and not among `values` are commented out.

    Raises:
        InputError: the class refuses a value.

    """
    settings = [setting for setting in declared(cls) if setting.option.recipe]
    if all(setting.name in values or not setting.required for setting in settings):
        make(cls, values)
    lines: list[str] = []
    for group, members in groupby(settings, key=lambda setting: setting.option.group):
        lines += [f"# ── {group} ──", ""]
        for setting in members:
            lines += [*_comment(setting), _line(setting, values), ""]
    return "\n".join(lines)


def _line(setting: Setting, values: Values) -> str:
    import yaml

    if setting.required and setting.name not in values:
        return f"# {setting.name}:"
    value = plain(values.get(setting.name, setting.default))
    # In PyYAML's mixed style a list stays on the line of its name, but a mapping of a single scalar gets braces.
    style = None if isinstance(value, list) else False
    text = yaml.safe_dump({setting.name: value}, default_flow_style=style, allow_unicode=True, width=float("inf"))
    return text.rstrip("\n")


def _comment(setting: Setting) -> list[str]:
    facts = [*setting.flags[:1], setting.bounds, "required" if setting.required else ""]
    known = "; ".join(filter(None, facts))
    return textwrap.wrap(
        f"{setting.option.help} [{known}]" if known else setting.option.help,
        100,
        initial_indent="# ",
        subsequent_indent="# ",
        break_on_hyphens=False,
    )


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f"--recipe: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _brief(found: Plain) -> str:
    return textwrap.shorten(json.dumps(found, default=str), 60)
