"""The paper's runs as recipes: they are read, and ask for what was published."""

import json
import re
from pathlib import Path

import pytest

from excise.cli.recipe import read_recipe
from excise.data.sources import places_of
from excise.report.beside import published
from excise.run import RunSettings
from excise.settings import indices, make

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PRESETS = {"Llama-3.1-8B-Instruct": "paper-llama", "Qwen3-14B": "paper-qwen"}


def settings_of(path):
    return make(RunSettings, {**read_recipe(RunSettings, path), "out": Path("out")})


def states_of(settings):
    """Blocks of the paper's own states of this model and budget."""
    name = settings.model.rpartition("/")[2].lower()
    rows = [row for row in published() if (row.model.lower(), row.removed) == (name, int(settings.remove))]
    return {row.model: [set(json.loads(r.blocks)) for r in rows if r.method.startswith("CBO")] for row in rows}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_asks_for_what_was_published(path):
    settings = settings_of(path)
    ((model, states),) = states_of(settings).items()
    assert states
    assert not any(state & set(settings.protect) for state in states)
    assert settings.heal_preset == PRESETS.get(model)
    assert (settings.samples, settings.loss_on, settings.energy, settings.select) == (2048, "all", "fisher", "energy")
    assert (settings.effort, settings.repair) == (0, False)
    assert len(places_of(settings.data)) == (1 if model in PRESETS else 5)
    assert f"--recipe recipes/{path.name} --out runs/{path.stem}" in path.read_text()


def test_every_published_budget_has_a_recipe():
    wanted = {(row.model.lower(), row.removed) for row in published() if row.removed}
    found = [settings_of(path) for path in RECIPES]
    assert {(s.model.rpartition("/")[2].lower(), int(s.remove)) for s in found} == wanted


def test_the_blocks_that_the_page_names_are_the_published_states():
    page = (FOLDER / "README.md").read_text()
    named = re.findall(r"--recipe recipes/(\S+) --force-blocks (\S+)", page)
    assert len(named) == 5
    for file, text in named:
        (states,) = states_of(settings_of(FOLDER / file)).values()
        assert set(indices(text, "--force-blocks")) in states[1:]
    for file, text in re.findall(r"\| `(\S+)` \| [^|]+ \| ([^|]+) \|", page):
        (states,) = states_of(settings_of(FOLDER / file)).values()
        assert set(indices(text.replace("–", "-"), "blocks")) == states[0]
