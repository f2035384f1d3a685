"""`excise times`: how long a request takes, and how much of it each kind of block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from excise.artefacts import json_text
from excise.errors import InputError
from excise.settings import Loading, Printing, Replacing, Requesting, option


@dataclass(frozen=True, kw_only=True)
class TimesSettings(Replacing, Printing, Requesting, Loading):
    """Settings of `excise times`."""

    batch: int = option(1, "Sequences at once; llama.cpp is timed with one.", group="Machine", least=1)
    out: Path = option(Path("times.json"), "File for the times.", group="Output", writes="file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch > 1 and self.engine != "transformers":
            raise InputError(f"--engine {self.engine} is timed with --batch 1, got {self.batch}")


def times(settings: TimesSettings) -> None:
    """Time prefill and decoding of the model and of each kind of its blocks, for --speedup and --remove-latency."""
    from excise.choosing.timing import measure_times
    from excise.cli.terminal import load_model, output
    from excise.context import Context
    from excise.ising.times import Request
    from excise.job import made_by
    from excise.report.tables import times_table

    context = Context(load_model(settings.model, **settings.loading()))
    request = Request(settings.prompt_tokens, settings.new_tokens, settings.batch)
    found = measure_times(context, request, settings.engine)
    found.save(settings.out, key=made_by(settings))
    if settings.as_json:
        typer.echo(json_text(found.to_json()))
        return
    output.print(times_table(found))
    output.print(f"times: {settings.out}")
