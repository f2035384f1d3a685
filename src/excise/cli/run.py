"""`excise run`: the main job, from a model to a smaller checkpoint with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excise.artefacts import json_text
from excise.cli.healing import healing_of, preset_of, print_healed, print_race
from excise.cli.options import (
    AsJson,
    BatchTokens,
    Checkpointing,
    Data,
    Device,
    Domains,
    Dtype,
    Effort,
    Force,
    ForceBlocks,
    LossOn,
    Model,
    ObjectiveText,
    Protect,
    Questions,
    SampleCount,
    Seed,
    TokenLimit,
    TrustRemoteCode,
    indices,
)

if TYPE_CHECKING:
    from excise.healing.settings import Preset


def run(
    model: Model,
    remove: Annotated[int, typer.Option(help="Number M of blocks to remove.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder for everything; the checkpoint is its `model`.", show_default=False)
    ],
    data: Data = "starter",
    samples: SampleCount = 128,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Samples kept apart to measure damage on.")] = 32,
    held_out_data: Annotated[str | None, typer.Option(help="Their source, if not --data itself.")] = None,
    tokens: TokenLimit = 512,
    seed: Seed = 0,
    loss_on: LossOn = "content",
    energy: Annotated[
        str | None,
        typer.Option(help="Energy shown and, with --select energy, followed: fisher, fisher+linear, fitted."),
    ] = None,
    effort: Effort = 4.0,
    objective: ObjectiveText = "kl",
    questions: Questions = None,
    domains: Domains = "mean",
    solver: Annotated[str, typer.Option(help="auto, branch-and-bound, exhaustive, tabu, annealing.")] = "auto",
    states: Annotated[int, typer.Option(min=1, help="Length K of the spectra.")] = 20,
    time_limit: Annotated[float, typer.Option(help="Seconds for the proof of each spectrum.")] = 60.0,
    verify_states: Annotated[int, typer.Option(min=1, help="States of each energy to measure.")] = 4,
    min_distance: Annotated[int, typer.Option(min=1, help="Smallest Hamming distance between those.")] = 1,
    random_states: Annotated[int, typer.Option(min=0, help="Random removals measured beside them.")] = 4,
    rivals: Annotated[
        str, typer.Option(help="Criteria that propose removals too, separated by commas; empty for none.")
    ] = "block-influence,block-influence-iterative,norm-ratio",
    select: Annotated[
        str | None,
        typer.Option(
            help="measured: lowest held-out loss, whoever proposed it; refined: lowest --objective; energy: the ground "
            "state. Default measured, or refined where the objective is another than kl or loss."
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair/--no-repair",
            help="Refit one matrix below each cut in closed form, where that is exact and helps.",
        ),
    ] = True,
    repair_tokens: Annotated[int, typer.Option(min=2, help="Calibration tokens to fit the repair on.")] = 4096,
    heal: Annotated[bool, typer.Option("--heal", help="Then train it to predict what the original does.")] = False,
    heal_race: Annotated[
        int | None, typer.Option(min=2, help="Heal so many of the best for a while; the winner is removed and healed.")
    ] = None,
    heal_preset: Annotated[str | None, typer.Option(help="small, paper-llama or paper-qwen.")] = None,
    heal_data: Annotated[str | None, typer.Option(help="Source of the samples to train on.")] = None,
    heal_samples: Annotated[int | None, typer.Option(min=1, help="How many.")] = None,
    heal_tokens: Annotated[int | None, typer.Option(min=2, help="Longest of them, in tokens.")] = None,
    heal_batch: Annotated[int | None, typer.Option(help="Samples an optimiser step.")] = None,
    heal_steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of the preset's epochs.")] = None,
    heal_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    heal_train: Annotated[str | None, typer.Option(help="all, lora, or cuts (the blocks next to a cut).")] = None,
    protect: Protect = "",
    force_blocks: ForceBlocks = "",
    batch_tokens: BatchTokens = None,
    checkpointing: Checkpointing = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Choose M blocks, remove them, and write the smaller model with measured damage beside predicted energy.

    Any option of healing implies --heal; `excise heal` has more of them.
    """
    plan = _healing_plan(
        heal,
        heal_race,
        heal_preset,
        {
            "data": heal_data,
            "samples": heal_samples,
            "tokens": heal_tokens,
            "batch": heal_batch,
            "steps": heal_steps,
            "learning_rate": heal_lr,
            "train": heal_train,
        },
        seed,
    )
    protected, forced = indices(protect, "--protect"), indices(force_blocks, "--force-blocks")

    from excise.choosing.verify import Candidate, Verified
    from excise.cli.prune import print_self_test
    from excise.cli.terminal import load_model, output, tokens_progress
    from excise.data import split_samples
    from excise.measuring.objectives import load_objective
    from excise.progress import Clock
    from excise.report.tables import candidates_table
    from excise.run import run as run_job
    from excise.run_folder import check_folder
    from excise.text import ranges

    check_folder(out, force)
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    clock = Clock()
    with clock.stage("load"):
        loaded = load_model(model, dtype=dtype, **options)
    with clock.stage("data"):
        calibration, apart = split_samples(
            data,
            loaded.tokenizer,
            samples=samples,
            held_out=held_out,
            held_out_data=held_out_data,
            tokens=tokens,
            seed=seed,
            loss_on=loss_on,
        )
    damage = load_objective(objective, calibration, loaded.tokenizer, questions=questions, domains=domains, seed=seed)
    if select is None:
        plain = domains == "mean" and all(term.kind != "choices" for term in damage.terms)
        select = "measured" if plain or not effort else "refined"
    healing = healing_of(plan, loaded, apart, race=heal_race or 1, loss_on=loss_on, **options) if plan else None
    facts = run_job(
        loaded,
        calibration,
        apart,
        remove,
        out,
        energy=energy,
        effort=effort,
        objective=damage,
        solver=solver,
        states=states,
        time_limit=time_limit,
        verify_states=verify_states,
        min_distance=min_distance,
        random_states=random_states,
        rivals=[name.strip() for name in rivals.split(",") if name.strip()],
        protected=protected,
        forced=forced,
        select=select,
        seed=seed,
        batch_tokens=batch_tokens,
        checkpointing=checkpointing,
        repair=repair,
        repair_tokens=repair_tokens,
        healing=healing,
        force=force,
        progress=tokens_progress,
        clock=clock,
    )
    if as_json:
        typer.echo(json_text(facts))
        return
    candidates = tuple(Candidate(**{**c, "removed": tuple(c["removed"])}) for c in facts["candidates"])
    verified = Verified(facts["base_loss"], candidates, facts["spearman"], 0.0)
    chosen = next(c for c in candidates if list(c.removed) == facts["removed"])
    output.print(candidates_table(verified, chosen, facts["parameters"]))
    rho = "" if facts["spearman"] is None else f"; energy against loss: Spearman ρ = {facts['spearman']:.2f}"
    output.print(f"intact: {facts['base_loss']:.4f} nats/token on {facts['held_out']['samples']} held-out samples{rho}")
    if facts["repair"] and facts["repair"]["applied"]:
        after = facts["checkpoint_loss"] - facts["base_loss"]
        output.print(f"repaired in closed form: Δ loss {chosen.delta:+.3f} → {after:+.3f} nats/token")
    print_self_test(facts["self_test"])
    output.print(f"checkpoint: {out / 'model'}   evidence: {out / 'run.json'}, {out / 'figures'}")
    if facts["race"]:
        print_race(facts["race"]["standings"], lambda standing: ranges(standing["removed"]))
    if facts.get("healed"):
        print_healed(out / facts["healed"]["checkpoint"], facts["healed"])


def _healing_plan(
    heal: bool, race: int | None, preset: str | None, options: dict[str, Any], seed: int
) -> Preset | None:
    """How to heal; None where no option of healing was given."""
    if not (heal or race or preset or any(value is not None for value in options.values())):
        return None
    return preset_of(preset or "small", {**options, "seed": seed})
