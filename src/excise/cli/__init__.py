"""The command line: one verb per file, each parses, calls the library and writes one artefact."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from excise import __version__
from excise.artefacts import disk_error
from excise.cli.command import GroupedCommand, command
from excise.cli.compare import compare
from excise.cli.evaluate import evaluate
from excise.cli.export import export
from excise.cli.heal import heal
from excise.cli.inspect import inspect
from excise.cli.plan import plan
from excise.cli.prune import prune
from excise.cli.refine import refine
from excise.cli.report import report
from excise.cli.run import run
from excise.cli.score import score
from excise.cli.solve import solve
from excise.cli.table import table
from excise.cli.times import times
from excise.cli.verify import verify
from excise.errors import ExciseError, SelfTestError
from excise.interrupts import said
from excise.team import launched
from excise.text import printable

FAILED, MISTAKE = 1, 2
# Seconds in which a launcher ends the other processes of a job that failed.
GRACE = 3.0

app = typer.Typer(
    name="excise",
    help="Remove whole blocks from language models: choose them by a proved spectrum, check them by measurement.",
    no_args_is_help=True,
    epilog=(
        "Exit status: 0 done, or done before; 1 a result failed its test and did not get its name; 2 a mistake in what "
        "was asked, a damaged input or a full disk; 130 Ctrl-C and 143 SIGTERM, after which the same command goes on."
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _reported(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors and an interrupt into one line and an exit status."""

    @wraps(verb)
    def call(**arguments: Any) -> None:
        try:
            verb(**arguments)
        except SelfTestError as error:
            raise _told(error, FAILED) from None
        except ExciseError as error:
            raise _told(error, MISTAKE) from None
        except KeyboardInterrupt as told:
            raise typer.Exit(said(told)) from None
        except Exception as error:
            # Others write too: PyTorch its checkpoints, lm-eval its caches.
            full = disk_error(error, "its files")
            if full is None:
                raise
            raise _told(full, MISTAKE) from None

    return call


def _told(error: Exception, status: int) -> typer.Exit:
    """Say what is wrong in one line; of several processes that find the same, the first."""
    rank, size = launched()
    if rank > 0:
        # The launcher ends the others once the first has failed; who is still here found something of its own.
        time.sleep(GRACE)
    whose = f"process {rank} of {size}: " if rank > 0 else ""
    typer.secho(printable(f"error: {whose}{error}"), fg=typer.colors.RED, err=True)
    return typer.Exit(status)


VERBS: tuple[Callable[..., None], ...] = (
    *(run, plan, inspect, score, times, solve, verify, refine, compare, prune, heal, evaluate, table, report, export),
)
for verb in VERBS:
    app.command(cls=GroupedCommand)(_reported(command(verb, recipes=verb is run)))


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        typer.echo(f"excise {__version__}")
        raise typer.Exit


def run_app() -> None:
    """Parse the command line and call the verb; see `excise.__main__.main` for the exit status."""
    warnings.showwarning = _show_warning
    gc.set_threshold(100_000)  # imports make many objects and no garbage: collecting them costs a fifth of a second
    # Completion asks by this name, however the program was started.
    app(prog_name="excise")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        typer.secho(printable(f"warning: {message}"), fg=typer.colors.YELLOW, err=True)
