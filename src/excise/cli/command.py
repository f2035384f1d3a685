"""A verb's options, made from the dataclass of its settings."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

from excise.errors import InputError
from excise.plain import Facts, Plain
from excise.settings import GROUPS, Printing, Setting, declared, make, plain, shares_apart
from excise.team import Team, join, launched, part

_LAST = GROUPS[-1]


class GroupedCommand(TyperCommand):
    """A command whose `--help` shows options under the headings of their groups; typer does so in rich mode only."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of `--help`."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or _LAST, []).append(record)
        for group in sorted(sections, key=GROUPS.index):
            with formatter.section(group):
                formatter.write_dl(sections[group])


def command(verb: Callable[[Any], None], *, recipes: bool = False) -> Callable[..., None]:
    """A function with the signature from which typer makes options; it calls `verb` with the settings given.

    typer hands on texts and leaves the rest to `excise.settings`, so that a bad value gets the same message from a
    recipe, from Python and from the command line, and so that what was not given is None: the recipe's to say.

    Args:
        verb: takes `settings`, annotated with a dataclass of `excise.settings.Printing`.
        recipes: add `--recipe FILE`, whose settings hold where the command line gives none, and `--print-recipe`.

    """
    cls = get_type_hints(verb)["settings"]
    settings = declared(cls)

    def call(**given: Any) -> None:
        from excise.cli.recipe import read_recipe, recipe_text

        source, printing = given.pop("recipe", None), given.pop("print_recipe", False)
        values = {} if source is None else read_recipe(cls, Path(source))
        given = shares_apart(cls, given)
        for setting in settings:
            if given.get(setting.name) is not None:
                values[setting.name] = setting.of_text(given[setting.name])
        if printing:
            typer.echo(recipe_text(cls, values), nl=False)
        else:
            _do(verb, make(cls, values))

    parameters = [_parameter(setting, recipes) for setting in settings]
    if recipes:
        parameters += _recipe_parameters()
    call.__name__, call.__doc__ = verb.__name__, verb.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _do(verb: Callable[[Plain], None], settings: Printing) -> None:
    """Call a verb, unless what it would write is there, made by the same command from the same files."""
    from excise.job import starting

    _answer_as(settings)
    with contextlib.ExitStack() as open_until_done:
        team = _together(verb, settings, open_until_done)
        job = team.once(lambda: open_until_done.enter_context(starting(settings)))
        if not job.done:
            verb(settings)
        elif settings.as_json:
            typer.echo(json.dumps({"out": str(job.out), "already_done": True}))
        elif not settings.quiet:
            typer.echo(f"already done: {job.out} was made by this command; --force makes it again", err=True)


def _together(verb: Callable[[Plain], None], settings: Plain, until_done: contextlib.ExitStack) -> Team:
    """Meet the other processes of a verb that divides its passes; all but the first write and say nothing.

    Raises:
        InputError: the verb does not divide its work, and several processes were started.

    """
    size = launched()[1]
    if size == 1 or settings.divides == "itself":
        return Team()
    if settings.divides == "no":
        raise InputError(f"excise {verb.__name__} does not divide its work among {size} processes; start one")
    team = join()
    until_done.callback(part)
    if not team.first:
        from excise.artefacts import discarding
        from excise.cli.terminal import console, output

        until_done.enter_context(discarding())
        until_done.enter_context(contextlib.redirect_stdout(io.StringIO()))
        console.quiet = output.quiet = True
    return team


def _answer_as(settings: Printing) -> None:
    """What is told besides results; the terminal is imported where something is asked of it, since it takes time."""
    if settings.quiet or settings.log_level != "warning":
        from excise.cli.terminal import be_quiet, tell_logs

        tell_logs(settings.log_level)
        if settings.quiet:
            be_quiet()


def _parameter(setting: Setting, recipes: bool) -> inspect.Parameter:
    from_recipe = recipes and setting.option.recipe
    repeated = setting.many and setting.option.parse is None
    annotation: Any = bool if setting.kind is bool else list[str] if repeated else str
    default: Any = ... if setting.required and not from_recipe else None
    options: Facts = {
        "help": _help(setting, from_recipe),
        "hidden": setting.option.hidden,
        "show_default": False,
        "rich_help_panel": setting.option.group,
    }
    if setting.option.argument:
        options["metavar"] = setting.called
        information = typer.Argument(default, **options)
    else:
        if setting.kind is not bool:
            options["metavar"] = f"<{'str' if setting.option.parse else setting.kind.__name__.lower()}>"
        information = typer.Option(default, *_spellings(setting, from_recipe), **options)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=information, annotation=annotation | None
    )


def _spellings(setting: Setting, from_recipe: bool) -> tuple[str, ...]:
    """Flags as typer takes them; what a recipe may have switched on has a flag that switches it off."""
    if setting.kind is not bool or (setting.default is False and not from_recipe):
        return setting.flags
    first, *aliases = setting.flags
    return (f"{first}/--no-{first.removeprefix('--')}", *aliases)


def _help(setting: Setting, from_recipe: bool) -> str:
    facts = [fact for fact in (_default(setting), setting.bounds) if fact]
    if setting.required and from_recipe:
        facts.append("required, here or in a recipe")
    return f"{setting.option.help}  [{'; '.join(facts)}]" if facts else setting.option.help


def _default(setting: Setting) -> str:
    if setting.option.shown is not None:
        text = setting.option.shown
    elif setting.required or setting.default is None or setting.default is False or setting.default in ("", ()):
        text = ""
    elif setting.kind is bool:
        text = setting.flags[0].removeprefix("--")
    elif setting.many:
        text = ",".join(map(str, plain(setting.default)))
    else:
        text = str(setting.default)
    return text and f"default: {text}"


def _recipe_parameters() -> list[inspect.Parameter]:
    read = typer.Option(
        None,
        "--recipe",
        metavar="<path>",
        help="Settings from a file: YAML, JSON, or the run.json of an earlier run; options given here go before it.",
        rich_help_panel=_LAST,
    )
    show = typer.Option(
        False,
        "--print-recipe",
        help="Print all settings as such a file, those not shown here too, and stop.",
        rich_help_panel=_LAST,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("recipe", kind, default=read, annotation=str | None),
        inspect.Parameter("print_recipe", kind, default=show, annotation=bool),
    ]
