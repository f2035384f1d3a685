"""`excise compare`: every criterion on one model, same calibration, same held-out text, same cost accounting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from excise.artefacts import atomic_path, json_text
from excise.choosing.contest import Contest
from excise.settings import Batching, Loading, Printing, Protecting, Sampling, budgets, option


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Printing, Batching, Protecting, Contest, Sampling, Loading):
    """Settings of `excise compare`."""

    divides = "passes"

    remove: tuple[int, ...] = option(
        ..., "Numbers M of blocks to remove, such as 4,8,12 or 3..8.", group="What to remove", parse=budgets
    )
    out: Path = option(
        ...,
        "Folder for everything; run again to go on or to add methods.",
        group="Output",
        recipe=False,
        writes="workspace",
    )
    held_out_data: str | None = option(
        None, "Source of the held-out text, if not --data itself.", flag="--eval", group="Data", reads="data"
    )
    held_out: int = option(32, "Held-out samples.", flag="--eval-samples", group="Data", least=2)
    held_out_tokens: int | None = option(
        None, "Longest of those, if not --tokens.", flag="--eval-tokens", group="Data", least=2
    )


def compare(settings: CompareSettings) -> None:
    """Let every criterion choose M blocks on the same samples, and measure all choices on the same held-out text."""
    from excise.choosing.brief import Brief
    from excise.choosing.compare import MANIFEST, WORK
    from excise.choosing.compare import compare as compare_methods
    from excise.cli.terminal import load_model, output, tokens_progress
    from excise.context import Context
    from excise.data import Fit, own_answers, split_samples
    from excise.progress import Progress
    from excise.report.comparison import comparison_markdown, comparison_tables, write_comparison_figures
    from excise.store import Store

    loaded, out = load_model(settings.model, **settings.loading()), settings.out
    calibration, apart = split_samples(
        settings.data,
        loaded.tokenizer,
        held_out=settings.held_out,
        held_out_data=settings.held_out_data,
        held_out_tokens=settings.held_out_tokens,
        fit=Fit.of(loaded.stack),
        own=own_answers(loaded),
        **settings.drawing(),
    )
    context = Context(loaded, Store(out / WORK), Progress(tokens_progress), settings.batch_tokens)
    brief = Brief.on(loaded.stack, max(settings.remove), protected=settings.protect, seed=settings.seed)
    comparison = compare_methods(context, calibration, apart, brief, settings.remove, settings)
    comparison.save(out / MANIFEST)
    write_comparison_figures(comparison, out / "figures")
    with atomic_path(out / "compare.md") as temporary:
        temporary.write_text(comparison_markdown(comparison), encoding="utf-8")
    if settings.as_json:
        typer.echo(json_text(comparison.to_json()))
        return
    for table in comparison_tables(comparison):
        output.print(table)
    output.print(
        f"intact: {comparison.base_loss:.4f} nats/token on {len(apart)} held-out samples; ● lowest, ○ not "
        f"distinguishable from it (paired bootstrap)\n{out / MANIFEST}   {out / 'compare.md'}   {out / 'figures'}"
    )
