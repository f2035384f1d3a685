"""`excise refine`: measured damage, an energy fitted to it, its lowest states measured, and so on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import json_text, write_artefact
from excise.settings import (
    Batching,
    Fixing,
    Loading,
    Objecting,
    Porting,
    Printing,
    Sampling,
    budgets,
    changed,
    check_fixed,
    option,
)

if TYPE_CHECKING:
    from excise.choosing.refine import Refined


@dataclass(frozen=True, kw_only=True)
class RefineSettings(Printing, Batching, Porting, Fixing, Objecting, Sampling, Loading):
    """Settings of `excise refine`."""

    divides = "passes"

    remove: tuple[int, ...] = option(
        ..., "Numbers M of blocks to remove, such as 8 or 4,8,12.", group="What to remove", parse=budgets
    )
    out: Path = option(
        ...,
        "Folder for candidates, energies and every measurement, which is reused.",
        group="Output",
        recipe=False,
        writes="workspace",
    )
    effort: float = changed(Objecting, "effort", least=None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fixed(self.protect, self.force_blocks, min(self.remove))


def refine(settings: RefineSettings) -> None:
    """Find removals of little measured damage; further budgets and runs reuse what is measured."""
    from excise.choosing.brief import Brief
    from excise.choosing.objectives import load_objective
    from excise.choosing.refine import refine as refine_budget
    from excise.choosing.refine import refinement_facts
    from excise.cli.terminal import announce_cost, load_model, output, tokens_progress
    from excise.context import Context
    from excise.data import Fit, load_samples, own_answers
    from excise.models.portable import pattern_of
    from excise.progress import Progress
    from excise.report.refinement import distributions_line, finalists_table, trust_line, write_refinement_figures
    from excise.settings import to_plain
    from excise.store import Store

    loaded, out = load_model(settings.model, **settings.loading()), settings.out
    context = Context(loaded, Store(out / "work"), Progress(tokens_progress), settings.batch_tokens)
    stack = loaded.stack
    pattern = pattern_of(stack.architecture, stack.model.config, settings.portable, loaded.raw_config)
    briefs = [
        Brief.on(
            stack,
            budget,
            protected=settings.protect,
            forced=settings.force_blocks,
            seed=settings.seed,
            pattern=pattern,
        )
        for budget in sorted(settings.remove, reverse=True)
    ]
    drawn = load_samples(
        settings.data, loaded.tokenizer, fit=Fit.of(loaded.stack), own=own_answers(loaded), **settings.drawing()
    )
    damage = load_objective(settings, drawn, loaded, settings.seed)
    spend = settings.effort * drawn.tokens
    announce_cost(context, drawn, spend * len(briefs))
    found: dict[int, Refined] = {}
    for brief in briefs:
        budget = brief.budget
        found[budget] = refine_budget(context, damage, brief, tokens=spend)
        found[budget].energy().save(out / f"energy-{budget}.safetensors")
        found[budget].search.spectrum.save(out / f"spectrum-fitted-{budget}.json")
        write_refinement_figures(found[budget], budget, out / "figures")
    facts = {
        "model": settings.model,
        "model_hash": context.identity,
        "settings": to_plain(settings),
        **refinement_facts(found, damage, settings.effort, drawn),
    }
    write_artefact(out / "candidates.json", facts)
    if settings.as_json:
        typer.echo(json_text(facts))
        return
    for budget, result in sorted(found.items()):
        output.print(finalists_table(result, budget, damage.title))
        output.print(trust_line(result))
        if line := distributions_line(result):
            output.print(line)
    output.print(f"{out / 'candidates.json'}   {out / 'figures'}")
