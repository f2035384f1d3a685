"""Options made from settings: refused before anything is read, shown by group, and given by a recipe too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from excise.cli import VERBS
from excise.cli.command import GroupedCommand, command
from excise.errors import InputError
from excise.ising.gradients import Gradients
from excise.progress import Clock
from excise.settings import Printing, Replacing, declared, indices, option, to_plain

SOLVE = ("solve", "--hessian", "absent.npy")
EXPORT = ("export", "absent.npy", "--out", "out.qubo", "--format", "qubo")
HEAL = ("heal", "absent", "--out", "out", "--teacher", "absent")
PRUNE = ("prune", "absent", "--out", "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SOLVE, "--remove", 4, "--solver", "nonsense"), "expected --solver in auto, branch-and-bound, exhaustive"),
        ((*SOLVE, "--remove", 4, "--time-limit", "nan"), "--time-limit expects a finite number, above 0, got nan"),
        ((*SOLVE, "--remove", 4, "--seed", -1), "--seed expects a whole number, from 0 to 4294967295, got -1"),
        ((*SOLVE, "--remove", 4, "--states", "x"), "--states expects a whole number, at least 1, got 'x'"),
        ((*SOLVE, "--remove", 4, "--protect", "5-2"), "--protect expects ranges from low to high"),
        ((*SOLVE, "--remove", 4, "--protect", 2, "--force-blocks", "2,3"), "2 cannot both stay and go"),
        (
            (*SOLVE, "--remove", "1..3", "--force-blocks", "2,3"),
            "--force-blocks expects at most as many as --remove, 1",
        ),
        ((*EXPORT, "--remove", 4, "--protect", "5-2"), "--protect expects ranges from low to high"),
        ((*EXPORT, "--remove", 4, "--protect", 1, "--force-blocks", 1), "1 cannot both stay and go"),
        ((*EXPORT, "--remove", 1, "--force-blocks", "1,2"), "--force-blocks expects at most as many as --remove, 1"),
        ((*EXPORT, "--remove", 1, "--penalty", "nan"), "--penalty expects safe, soft or a number, got 'nan'"),
        (("inspect", "absent", "--dtype", "half"), "expected --dtype in auto, float32"),
        (("score", "absent", "--seed", -1), "--seed expects a whole number"),
        (("verify", "absent", "--removed", "5-2"), "--removed expects ranges from low to high"),
        (("verify", "absent", "--removed", 5, "--seed", -1), "--seed expects a whole number"),
        ((*PRUNE, "--removed", "5-2"), "--removed expects ranges from low to high"),
        ((*PRUNE, "--removed", 5, "--merge", "nonsense"), "expected --merge in figure, code"),
        ((*HEAL, "--lr", "nan"), "--lr (learning_rate) expects a finite number, above 0, got nan"),
        ((*HEAL, "--preset", "nonsense"), "expected --preset in small"),
        (("evaluate", "absent", "--limit", 0), "--limit expects a whole number, at least 1, got 0"),
        (("table", "absent", "--metric", "acc"), "--metric expects TASK=METRIC"),
    ],
)
def test_bad_values_are_refused_in_one_line_before_anything_is_read(excise, arguments, message):
    status, out, err = excise(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@dataclass(frozen=True, kw_only=True)
class WalkSettings(Printing):
    goal: str = option(..., "Where to.", argument=True)
    steps: int = option(10, "How many.", least=1, group="Data")
    pace: float = option(1.5, "Metres per second.", above=0)
    resting: bool = option(False, "Whether to rest.")
    log: Path | None = option(None, "Where it is written.", group="Output")
    stops: tuple[int, ...] = option((), "Where to stop.", parse=indices)
    friends: tuple[str, ...] = option((), "Who comes along; repeatable.")
    secret: int = option(7, "For those who know.", hidden=True)


def walk(settings: WalkSettings) -> None:
    """Walk somewhere."""
    typer.echo(json.dumps({**to_plain(settings), "json": settings.as_json}))


@pytest.fixture
def run():
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=GroupedCommand)(command(walk, recipes=True))

    def call(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        if isinstance(result.exception, InputError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return call


def test_options_become_settings_of_their_types(run):
    given = ("home", "--steps", 3, "--stops", "1-3,-1", "--friends", "Ann", "--friends", "Bo", "--log", "a/b", "--json")
    assert json.loads(run(*given)) == {
        "goal": "home", "pace": 1.5, "resting": False, "stops": [1, 2, 3, -1], "friends": ["Ann", "Bo"], "secret": 7,
        "steps": 3, "log": "a/b", "json": True,
    }  # fmt: skip


def test_help_is_by_group_and_names_defaults_and_bounds_but_nothing_hidden(run):
    text = run("--help")
    headings = [line for line in text.splitlines() if line and not line.startswith(" ") and line.endswith(":")]
    assert headings == ["Arguments:", "Options:", "Data:", "Output:"]
    assert "[default: 10; at least 1]" in text
    assert "--resting / --no-resting" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.yaml", "goal: home\nsteps: 3\npace: 1e-4\nstops: 1-3\nresting: true\n"),
        ("r.json", '{"goal": "home", "steps": 3, "pace": 1e-4, "stops": [1, 2, 3], "resting": true}'),
        (
            "run.json",
            '{"M": 4, "settings": {"goal": "home", "steps": 3, "pace": 1e-4, "stops": [1, 2, 3], "resting": true}}',
        ),
    ],
)
def test_a_recipe_gives_what_the_command_line_does_not(run, tmp_path, name, content):
    recipe = tmp_path / name
    recipe.write_text(content)
    found = json.loads(run("--recipe", recipe))
    assert (found["goal"], found["steps"], found["pace"], found["stops"]) == ("home", 3, 1e-4, [1, 2, 3])
    assert found["resting"] is True
    found = json.loads(run("away", "--recipe", recipe, "--steps", 5, "--no-resting"))
    assert (found["goal"], found["steps"], found["pace"], found["resting"]) == ("away", 5, 1e-4, False)


def test_a_printed_recipe_is_complete_and_gives_the_same_settings(run, tmp_path):
    given = ("home: no", "--pace", 1e-4, "--stops", "1-3", "--friends", "Ann, of 'here'", "--resting", "--log", "ä/b")
    text = run(*given, "--print-recipe")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text, encoding="utf-8")
    assert run("--recipe", recipe) == run(*given)
    assert list(yaml.safe_load(text)) == list(to_plain(WalkSettings(goal="x")))
    assert "stops: [1, 2, 3]\n" in text
    assert "secret: 7\n" in text
    assert "# How many. [--steps; at least 1]\n" in text


def test_a_printed_recipe_leaves_open_what_must_be_given(run):
    assert "\n# goal:\n" in run("--print-recipe")
    with pytest.raises(InputError, match="--steps expects"):
        run("home", "--steps", 0, "--print-recipe")


def test_what_neither_gives_is_named(run):
    with pytest.raises(InputError, match="GOAL is missing: Where to"):
        run("--steps", 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.yaml", "- 1\n", r"r\.yaml is no recipe: expected settings by name, such as 'seed: 0', got \[1\]"),
        ("r.yaml", "", r"r\.yaml is no recipe: .* got null"),
        ("r.yaml", "a: [\n", r"r\.yaml is not YAML: while parsing"),
        ("r.yaml", "stepss: 3\n", r"r\.yaml: 'stepss' is not a setting; did you mean 'steps'\?"),
        ("r.yaml", "as_json: true\n", r"'as_json' is not a setting"),
        ("r.yaml", "goal: home\nsteps: 0\n", r"--steps expects a whole number, at least 1, got 0"),
        ("r.json", '{"steps": "3"}', r"r\.json: --steps expects a whole number, at least 1, got '3'"),
    ],
)
def test_bad_recipes_are_refused(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        run("--recipe", tmp_path / name)


def test_a_recipe_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"--recipe: cannot read .*absent\.yaml: No such file"):
        run("--recipe", tmp_path / "absent.yaml")


def test_what_a_class_checks_itself_is_refused_too():
    @dataclass(frozen=True, kw_only=True)
    class Pair(Printing):
        low: int = option(0, "Lowest.")
        high: int = option(1, "Highest.")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.low > self.high:
                raise InputError("--low is above --high")

    def pair(settings):
        typer.echo(f"{settings.low} {settings.high}")

    pair.__annotations__["settings"] = Pair
    app = typer.Typer()
    app.command()(command(pair))
    assert CliRunner().invoke(app, ["--high", "3"]).output == "0 3\n"
    assert isinstance(CliRunner().invoke(app, ["--low", "3"]).exception, InputError)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_every_verb_answers_alike(verb):
    """--json, --quiet and --log-level are there, and --force means one thing wherever it is."""
    options = {setting.name: setting.option for setting in declared(get_type_hints(verb)["settings"])}
    for owner in (Printing, Replacing):
        for setting in declared(owner):
            if owner is Printing or setting.name in options:
                assert options[setting.name] == setting.option
    flags = [flag for name, known in options.items() for flag in known.flags if name != "force"]
    assert not {"--force", "--overwrite"} & set(flags)


def in_a_process(*arguments, **variables):
    """Exit status, standard output and standard error: what is asked for quiet stays so for a whole process."""
    code = "import sys; sys.argv[0] = 'excise'; from excise.__main__ import main; main()"
    made = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    return made.returncode, made.stdout, made.stderr


def test_quiet_leaves_results_and_errors(tmp_path):
    few = np.random.default_rng(0).normal(size=(3, 6))  # too few samples, of which a warning tells
    Gradients(few, np.ones(3), tuple(range(6)), ("moe",) * 6, ("a", "b", "c")).save(tmp_path / "A.safetensors")
    solve = ("solve", tmp_path / "A.safetensors", "--remove", 2, "--out", tmp_path / "s.json")
    status, out, err = in_a_process(*solve, "--quiet")
    assert (status, err) == (0, "")
    assert "certified" in out
    assert in_a_process(*solve, "--quiet", "--json")[1:] == (
        f'{{"out": "{tmp_path / "s.json"}", "already_done": true}}\n',
        "",
    )
    assert in_a_process(*solve, "--quiet") == (0, "", "")
    assert "warning: " in in_a_process(*solve, "--force")[2]
    assert in_a_process(*solve[:2], "--remove", 9, "--quiet")[0] == 2
    assert in_a_process(*solve[:2], "--remove", 9, "--quiet")[2].startswith("error: ")


def test_logs_tell_how_long_each_stage_took(caplog):
    with caplog.at_level("INFO", logger="excise"), Clock().stage("gradients"):
        pass
    assert [record.getMessage() for record in caplog.records] == ["gradients took 0.0 s"]


def test_the_shell_completes_verbs_and_options():
    def completed(words):
        wanted = {"_EXCISE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return in_a_process(**wanted)[1].split()

    assert completed("excise re") == ["refine", "report"]
    assert completed("excise report --fig") == ["--figures"]


def test_help_says_what_exit_statuses_mean(excise):
    status, out, _ = excise("--help")
    assert status == 0
    documented = re.findall(r"^\| (\d+) \|", Path("docs/reliability.md").read_text(), re.MULTILINE)
    assert {*documented} == {"0", "1", "2", "130", "143"} == {*re.findall(r"\b\d+\b", out.partition("Exit status")[2])}
