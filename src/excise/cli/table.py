"""`excise table`: the paper's Table 1 (scores) and Table 2 (blocks removed) from folders of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import json_text
from excise.errors import InputError
from excise.settings import Printing, names_in, option

if TYPE_CHECKING:
    from excise.report.material import Material


@dataclass(frozen=True, kw_only=True)
class TableSettings(Printing):
    """Settings of `excise table`."""

    folders: tuple[Path, ...] = option(..., "Folders of `excise run`, `compare` and `evaluate`.", argument=True)
    format: str = option(
        "markdown", "markdown, latex or csv.", flag="--format", choices=names_in("excise.report.paper_tables:FORMATS")
    )
    which: str = option("both", "1: scores; 2: blocks removed; both.", choices=("1", "2", "both"))
    metric: tuple[str, ...] = option((), "TASK=METRIC to show, such as hellaswag=acc; repeatable.")
    beside: str | None = option(
        None,
        "Whose published numbers to put beside these: paper.",
        choices=names_in("excise.report.beside:PUBLISHED"),
    )
    random: bool = option(False, "List random removals in Table 2 too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.metric:
            _pair(text)


def table(settings: TableSettings) -> None:
    """Print the paper's tables; the best of a column is bold only where its lead exceeds the error."""
    metrics = dict(map(_pair, settings.metric))

    from excise.report.material import gather
    from excise.report.paper_tables import benchmark_rows, benchmark_table, removal_rows, removal_table

    found = [gather(folder) for folder in settings.folders]
    if settings.beside:
        _print_beside(settings.beside, found, metrics, settings)
        return
    scores = benchmark_rows(found, metrics) if settings.which != "2" else []
    removals = removal_rows(found, random=settings.random) if settings.which != "1" else []
    if settings.as_json:
        names = ("removed", "model", "method", "blocks")
        rows = [dict(zip(names, row, strict=True)) for row in removals]
        typer.echo(json_text({"scores": [asdict(row) for row in scores], "removals": rows}))
        return
    parts = [benchmark_table(scores, settings.format)] if scores else []
    parts += [removal_table(removals, settings.format)] if removals else []
    typer.echo("\n".join(parts), nl=False)


def _print_beside(name: str, found: Sequence[Material], metrics: Mapping[str, str], settings: TableSettings) -> None:
    from excise.report.beside import beside_rows, beside_table, published
    from excise.report.paper_tables import benchmark_rows, removal_rows

    rows = benchmark_rows(found, metrics)
    # What chance and a method both proposed is the method's.
    drawn = {row.method for row in rows if all(name.startswith("random") for name in row.method.split(", "))}
    scores = [row for row in rows if settings.random or row.method not in drawn]
    pairs = beside_rows(published(name), scores, removal_rows(found, random=settings.random))
    if settings.as_json:
        typer.echo(json_text({"beside": [pair.to_json() for pair in pairs]}))
        return
    typer.echo(beside_table(pairs, settings.format, settings.which), nl=False)


def _pair(text: str) -> tuple[str, str]:
    task, equals, name = text.partition("=")
    if not (task and equals and name):
        raise InputError(f"--metric expects TASK=METRIC such as hellaswag=acc, got '{text}'")
    return task, name
