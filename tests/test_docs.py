"""What README and docs show runs: Python on a tiny model, commands as far as their options."""

from __future__ import annotations

import pydoc
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import typer

import excise.cli as cli
from excise.artefacts import RECIPE
from excise.settings import declared, shares_apart
from excise.surgery.gguf import RECIPE_KEYS

from .tiny import tiny_folder

ROOT = Path(__file__).parent.parent
# The log keeps commands as they were on the day.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes/README.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/log.md"}),
]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPTIONAL = {"dimod"}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[tuple[str, bool]]:
    """Every `excise VERB …` of a page, and whether it stands as a line of its own, to be typed as it is."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (?:\S*/)?(excise [a-z].*)$", text, re.MULTILINE)
    inline = re.findall(r"`(excise [a-z][^`]*)`", text)
    return [(line, True) for line in lines] + [(line, False) for line in inline]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_python_on_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / HUB_MODEL, layers=12)
    A = np.random.default_rng(0).standard_normal((160, 30))
    np.save("H.npy", A.T @ A / len(A))
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(page)):
        try:
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise


@pytest.mark.parametrize(
    ("page", "line", "alone"), [(page.name, *command) for page in PAGES for command in commands(page)]
)
def test_commands_on_a_page_parse(page, line, alone):
    words = [word for word in shlex.split(re.sub(r'"\$\([^)]*\)"', "MODEL", line), comments=True)[1:] if word != "…"]
    verb = typer.main.get_command(cli.app).commands[words[0]]
    try:
        context = verb.make_context(words[0], words[1:])
    except typer.Exit:
        assert "--help" in words
        return
    except Exception as error:
        # In a sentence what does not matter there may be left out. typer keeps its exceptions to itself.
        if alone or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise
        return
    settings = get_type_hints(getattr(cli, words[0]))["settings"]
    given = shares_apart(settings, context.params)
    for setting in declared(settings):
        if given.get(setting.name) is not None:
            setting.of_text(given[setting.name])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules_named_on_a_page_exist(page):
    found = re.findall(r"`(excise(?:\.\w+)+)[`(]", page.read_text(encoding="utf-8"))
    for name in sorted(set(found) - {*RECIPE_KEYS, RECIPE}):
        assert pydoc.locate(name) is not None, name
