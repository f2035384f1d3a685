"""`excise run`: the main job, from a model to a smaller checkpoint with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from excise.artefacts import json_text
from excise.cli.healing import healing_of, preset_of, print_healed, print_race
from excise.plain import Facts
from excise.run import MANIFEST, RunResult, RunSettings, check_folder

# Of the blocks, for an amount of which nothing is known yet.
UNKNOWN_SHARE = 0.25

if TYPE_CHECKING:
    from excise.data import Fit, Samples
    from excise.data.answers import Answer
    from excise.forecast import Advice, Outline
    from excise.healing.settings import Preset


def run(settings: RunSettings) -> None:
    """Choose M blocks, remove them, and write the smaller model with measured damage beside predicted energy.

    --remove and --effort are the dials. Any option of healing implies --heal; `excise heal` has more of them, and
    --print-recipe shows the settings that stand here not.
    """
    check_folder(settings)
    from excise.healing.trackers import Tracking

    plan, tracking = _healing_plan(settings), Tracking(settings.heal_report_to, settings.out / "tensorboard")

    from excise.cli.terminal import load_model, tokens_progress
    from excise.data import Fit, own_answers
    from excise.job import made_by
    from excise.progress import Clock, Progress
    from excise.run import run as run_job

    clock = Clock()
    with clock.stage("data"):
        outline = _outline(settings)
        drawn = _drawn_early(settings, outline)
    with clock.stage("plan"):
        advice = None if outline is None else _advice(settings, outline, drawn)
    with clock.stage("load"):
        loaded = load_model(settings.model, **settings.loading() | _placement(settings, advice))
    if drawn is None:
        with clock.stage("data"):
            drawn = _split(settings, loaded.tokenizer, Fit.of(loaded.stack), own_answers(loaded))
    calibration, apart = drawn
    healing = healing_of(plan, loaded, apart, settings, tracking, race=settings.heal_race or 1) if plan else None
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


def _outline(settings: RunSettings) -> Outline | None:
    """What is known of the model before it is loaded; of a GGUF file, which is read whole, nothing is."""
    from excise.forecast import Outline

    return None if Path(settings.model).suffix == ".gguf" else Outline.of(settings)


def _drawn_early(settings: RunSettings, outline: Outline | None) -> tuple[Samples, Samples] | None:
    """Samples, where they can be drawn before the model is loaded: what they are decides what it takes."""
    from excise.data import Fit
    from excise.data.sources import asks_model

    sources = (settings.data, settings.held_out_data)
    if outline is None or outline.known.tokenizer is None or any(map(asks_model, filter(None, sources))):
        return None
    return _split(settings, outline.known.tokenizer, Fit.described(outline.known.config))


def _split(settings: RunSettings, tokenizer: Any, fit: Fit, own: Answer | None = None) -> tuple[Samples, Samples]:
    from excise.data import split_samples

    return split_samples(
        settings.data,
        tokenizer,
        held_out=settings.held_out,
        held_out_data=settings.held_out_data,
        fit=fit,
        own=own,
        **settings.drawing(),
    )


def _advice(settings: RunSettings, outline: Outline, drawn: tuple[Samples, Samples] | None) -> Advice:
    """What the job will take, told before it is begun; of several processes the first sees how much is free."""
    from excise.cli.plan import most_tokens
    from excise.cli.terminal import console
    from excise.team import team

    tokens = most_tokens(settings) if drawn is None else (drawn[0].tokens, drawn[1].tokens)
    work = outline.work(
        settings,
        remove=settings.remove or _blocks_about(settings, outline),
        tokens=tokens,
        repair_tokens=settings.repair_tokens,
        batch_tokens=settings.batch_tokens,
    )
    advice = team().once(lambda: outline.advice(work))
    for line in advice.lines():
        console.print(f"plan: {line}")
    return advice


def _blocks_about(settings: RunSettings, outline: Outline) -> int:
    """How many blocks an amount stands for, about, as if all were alike."""
    from excise.settings import amount_of

    blocks = outline.shape.blocks
    # Of times in milliseconds nothing is known before they are measured.
    wholes = {"parameters": sum(blocks), "bytes": sum(blocks) * outline.known.stored.itemsize}
    shares = [
        amount_of(goal.amount, whole, goal.asked) / whole
        for goal in settings.goals()
        if (whole := wholes.get(goal.measure, 1.0 if goal.amount.endswith("%") else 0.0))
    ]
    return max(1, round(len(blocks) * min(1.0, max(shares, default=UNKNOWN_SHARE))))


def _placement(settings: RunSettings, advice: Advice | None) -> Facts:
    return {"placement": advice.placement} if advice and settings.loading()["placement"] == "auto" else {}


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
