"""`excise run`: the main job, from a model to a smaller checkpoint with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import json_text
from excise.cli.healing import healing_of, preset_of, print_healed, print_race
from excise.plain import Facts
from excise.run import MANIFEST, RunResult, RunSettings, check_folder

if TYPE_CHECKING:
    from excise.healing.settings import Preset


def run(settings: RunSettings) -> None:
    """Choose M blocks, remove them, and write the smaller model with measured damage beside predicted energy.

    --remove and --effort are the dials. Any option of healing implies --heal; `excise heal` has more of them, and
    --print-recipe shows the settings that stand here not.
    """
    check_folder(settings)
    plan = _healing_plan(settings)

    from excise.cli.terminal import load_model, tokens_progress
    from excise.data import Fit, own_answers, split_samples
    from excise.job import made_by
    from excise.progress import Clock, Progress
    from excise.run import run as run_job

    clock = Clock()
    with clock.stage("load"):
        loaded = load_model(settings.model, **settings.loading())
    with clock.stage("data"):
        calibration, apart = split_samples(
            settings.data,
            loaded.tokenizer,
            held_out=settings.held_out,
            held_out_data=settings.held_out_data,
            fit=Fit.of(loaded.stack),
            own=own_answers(loaded),
            **settings.drawing(),
        )
    healing = healing_of(plan, loaded, apart, settings, race=settings.heal_race or 1) if plan else None
    result = run_job(
        loaded,
        calibration,
        apart,
        settings,
        healing=healing,
        progress=Progress(tokens_progress),
        clock=clock,
        made_by=made_by(settings),
    )
    if settings.as_json:
        typer.echo(json_text(result.to_json()))
    else:
        _show(result, settings)


def _show(result: RunResult, settings: RunSettings) -> None:
    from excise.choosing.candidate import Verified
    from excise.cli.prune import print_self_test
    from excise.cli.terminal import output
    from excise.report.page import PAGE
    from excise.report.tables import candidates_table, speed_line
    from excise.text import ranges

    out = settings.out
    verified = Verified(result.choice["base_loss"], result.candidates, result.spearman, 0.0)
    chosen = next(c for c in result.candidates if c.removed == result.removed)
    output.print(candidates_table(verified, chosen, result.parameters))
    rho = "" if result.spearman is None else f"; energy against loss: Spearman ρ = {result.spearman:.2f}"
    output.print(f"chosen by {result.choice['samples']['samples']} held-out samples{rho}")
    if len(result.choice["tied"]) > 1:
        others = "; ".join(
            ranges(each["removed"]) for each in result.choice["tied"] if each["removed"] != [*result.removed]
        )
        output.print(f"no worse beyond chance: {others}; of those, the worst domain of the chosen one suffers least")
    damage, before = result.damage, result.pruned_loss - result.base_loss
    repaired = f"{before:+.3f}, repaired in closed form " if result.repair and result.repair["applied"] else ""
    output.print(
        f"on {result.held_out['samples']} others: Δ loss {repaired}{damage['delta']:+.3f} ± {damage['error']:.3f} "
        f"nats/token, intact {result.base_loss:.4f}"
    )
    domains = [f"{name or 'unnamed'} {delta:+.2f}" for name, delta in sorted(damage["domains"].items())]
    if len(domains) > 1:
        output.print(f"by domain: {', '.join(domains)}")
    print_self_test(result.self_test)
    if result.speed:
        output.print(f"{result.asked}: {speed_line(result.speed)}")
    if settings.panel:
        _show_panel(out)
    page = f"   report: {out / PAGE}" if result.figures else ""
    output.print(f"checkpoint: {out / result.checkpoint}   evidence: {out / MANIFEST}{page}")
    if result.race:
        print_race(result.race["standings"], lambda standing: ranges(standing["removed"]))
    if result.healed:
        print_healed(out / result.healed["checkpoint"], result.healed)


def _show_panel(folder: Path) -> None:
    from excise.cli.terminal import output
    from excise.evaluation.panel.panel import FILE, Panel
    from excise.report.panel import panel_table

    # A model that does not generate has none.
    if (folder / FILE).exists():
        output.print(panel_table(Panel.load(folder / FILE), brief=True))
        output.print(f"panel, with every answer: {folder / FILE}")


def _healing_plan(settings: RunSettings) -> Preset | None:
    """How to heal; None where no option of healing was given."""
    if not settings.heals:
        return None
    options: Facts = {
        "data": settings.heal_data,
        "samples": settings.heal_samples,
        "tokens": settings.heal_tokens,
        "batch": settings.heal_batch,
        "steps": settings.heal_steps,
        "learning_rate": settings.heal_lr,
        "train": settings.heal_train,
    }
    return preset_of(settings.heal_preset or "small", {**options, "seed": settings.seed})
