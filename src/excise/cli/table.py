"""`excise table`: the paper's Table 1 (scores) and Table 2 (blocks removed) from folders of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excise.errors import InputError


def table(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of `excise run`, `compare` and `evaluate`.", show_default=False)
    ],
    style: Annotated[str, typer.Option("--format", help="markdown, latex or csv.")] = "markdown",
    which: Annotated[str, typer.Option(help="1: scores; 2: blocks removed; both.")] = "both",
    metric: Annotated[
        list[str] | None, typer.Option(help="TASK=METRIC to show, such as hellaswag=acc; repeatable.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="List random removals in Table 2 too.")] = False,
) -> None:
    """Print the paper's tables; the best of a column is bold only where its lead exceeds the error."""
    metrics = dict(_pair(text) for text in metric or ())
    if which not in ("1", "2", "both"):
        raise InputError(f"expected --which 1, 2 or both, got '{which}'")

    from excise.report.material import gather
    from excise.report.paper_tables import benchmark_rows, benchmark_table, removal_rows, removal_table

    found = [gather(folder) for folder in folders]
    parts = []
    if which != "2":
        parts.append(benchmark_table(benchmark_rows(found, metrics), style))
    if which != "1":
        parts.append(removal_table(removal_rows(found, random=random), style))
    typer.echo("\n".join(parts), nl=False)


def _pair(text: str) -> tuple[str, str]:
    task, equals, name = text.partition("=")
    if not (task and equals and name):
        raise InputError(f"--metric expects TASK=METRIC such as hellaswag=acc, got '{text}'")
    return task, name
