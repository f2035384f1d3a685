"""`excise plan`: what a run will take, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from excise.artefacts import json_text
from excise.settings import REPAIR_TOKENS, Batching, Naming, Objecting, Printing, Sampling, option

if TYPE_CHECKING:
    from excise.run import RunSettings


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Printing, Batching, Objecting, Sampling, Naming):
    """Settings of `excise plan`."""

    remove: int = option(..., "Number M of blocks to remove.", group="What to remove", least=1)
    held_out: int = option(64, "Held-out samples.", group="Data", least=1)
    memory: float | None = option(
        None, "GiB of memory there is, of the GPUs or the machine; by default what is free here.", above=0
    )
    measure: bool = option(False, "Time a few blocks and the disk here, so that stages have times.")


# Of a sample, where no limit is set: more than models answer (excise.data.answers).
LONG = 512


def most_tokens(settings: PlanSettings | RunSettings) -> tuple[int, int]:
    """Tokens to calibrate on and held out, at most: where what is drawn cannot be told without the model."""
    longest = settings.tokens or LONG
    return settings.samples * longest, settings.held_out * longest


def plan(settings: PlanSettings) -> None:
    """Show memory, reads and time of every stage of `excise run`, resident and streamed, by the config alone."""
    from excise.data import Fit, split_samples
    from excise.data.sources import asks_model
    from excise.forecast import Outline

    outline = Outline.of(settings)
    tokenizer = outline.known.tokenizer
    tokens = most_tokens(settings)
    if tokenizer is not None and not asks_model(settings.data):
        drawn = split_samples(
            settings.data,
            tokenizer,
            held_out=settings.held_out,
            fit=Fit.described(outline.known.config),
            **settings.drawing(),
        )
        tokens = drawn[0].tokens, drawn[1].tokens
    work = outline.work(
        settings,
        remove=settings.remove,
        tokens=tokens,
        repair_tokens=REPAIR_TOKENS,
        batch_tokens=settings.batch_tokens,
    )
    speed = outline.speed() if settings.measure else None
    advice = outline.advice(work, settings.memory * 2**30 if settings.memory else None, speed)
    if settings.as_json:
        typer.echo(json_text({**advice.describe(), "work": asdict(work)}))
        return
    from excise.cli.terminal import output
    from excise.report.tables import forecast_table

    for each in advice.forecasts:
        output.print(forecast_table(each))
    output.print(advice.lines()[-1])
