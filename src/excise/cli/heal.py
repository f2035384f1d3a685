"""`excise heal`: distil the original into a pruned model."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excise.artefacts import json_text
from excise.cli.healing import preset_of, print_healed, print_race, training_bar
from excise.cli.options import AsJson, Device, Force, LossOn, TrustRemoteCode
from excise.errors import InputError

if TYPE_CHECKING:
    from excise.data import Samples
    from excise.healing.settings import Preset, Settings
    from excise.healing.teachers import Teacher
    from excise.models.loading import Loaded


def heal(
    pruned: Annotated[
        list[str], typer.Argument(help="The pruned checkpoint's folder; several race, and the winner is healed.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the healed checkpoint.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="The original: a folder, a .gguf file or a hub id.")] = "",
    offline: Annotated[
        Path | None,
        typer.Option(help="Folder of the teacher's top-k log-probabilities; computed once if they are not there."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens that such a recording keeps at each position.")] = 64,
    preset: Annotated[str, typer.Option(help="small, paper-llama or paper-qwen; options change it.")] = "small",
    data: Annotated[str | None, typer.Option(help="Source of the samples, as for the other verbs.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Samples drawn, held-out ones included.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Longest sample, in tokens.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the samples kept apart.")] = None,
    loss_on: LossOn = "content",
    teacher_precision: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, or int8 or nf4 through bitsandbytes.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate of AdamW.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples an optimiser step, over all processes.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Most samples that a process holds at once.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the samples.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of --epochs.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Warm-up steps; below 1, a share of all steps.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the divergence.")] = None,
    cross_entropy: Annotated[float | None, typer.Option(help="Weight of the next token's cross-entropy.")] = None,
    hidden: Annotated[float | None, typer.Option(help="Weight of the residual streams' distance.")] = None,
    train: Annotated[str | None, typer.Option(help="all, lora, or cuts (the blocks next to a cut).")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of LoRA's updates.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bf16-mixed.")] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Recompute blocks to save memory."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw, the order and LoRA.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Train a pruned model to predict what its original does; an interrupted training goes on.

    Of several pruned models, all train for a while, the worse half is dropped, and so on until one is left.
    """
    if not teacher and offline is None:
        raise InputError("expected --teacher ORIGINAL, --offline FOLDER, or both")

    from excise.healing.heal import check_destination
    from excise.healing.heal import heal as heal_model

    for folder in pruned:
        check_destination(out, folder, force)
    plan = preset_of(
        preset,
        {
            "data": data, "samples": samples, "tokens": tokens, "held_out": held_out, "teacher": teacher_precision,
            "learning_rate": learning_rate, "batch": batch, "micro_batch": micro_batch, "epochs": epochs,
            "steps": steps, "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "temperature": temperature,
            "cross_entropy": cross_entropy, "hidden": hidden, "train": train, "lora_rank": lora_rank,
            "precision": precision, "checkpointing": checkpointing, "seed": seed, "save_every": save_every,
        },
    )  # fmt: skip
    settings = plan.settings
    from excise.cli.terminal import load_model
    from excise.surgery.feasible import require_writable

    place = _own_device(device)
    open_student = partial(load_model, dtype="float32", device=place, trust_remote_code=trust_remote_code)
    student = open_student(pruned[0])
    require_writable(student.folder, out, changes=student.stack.model, overwrite=force)
    drawn, apart = _samples(plan, student, settings.seed, loss_on)
    said = _teacher(teacher, offline, top_k, plan.teacher, place, trust_remote_code, student, drawn, settings)
    options: dict[str, Any] = {"force": force, "tensorboard": tensorboard}
    heats = out.with_name(f".{out.name}.race")
    if len(pruned) > 1:
        from excise.healing.race import race

        with training_bar() as report:
            result = race(
                pruned, said, drawn, apart, heats, settings,
                open_student=open_student, report=lambda name, progress: report(progress, Path(name).name),
            )  # fmt: skip
        student = open_student(result.winner.student)
        options |= {"work": result.winner.work, "further": {"race": result.describe()}}
    with training_bar() as report:
        facts = heal_model(student, said, drawn, apart, out, settings, report=report, **options)
    if not facts:
        return
    shutil.rmtree(heats, ignore_errors=True)
    if as_json:
        typer.echo(json_text({"out": str(out), **facts}))
        return
    print_race(facts.get("race", {}).get("standings", ()), lambda standing: standing["student"])
    print_healed(out, facts)


def _own_device(device: str) -> str:
    """One GPU a process where several train together; else as asked."""
    import torch

    if device == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def _samples(plan: Preset, student: Loaded, seed: int, loss_on: str) -> tuple[Samples, Samples]:
    from excise.data import load_samples

    if not 0 < plan.held_out < 1:
        raise InputError(f"--held-out expects a share between 0 and 1, got {plan.held_out}")
    wanted = plan.samples or sys.maxsize
    drawn = load_samples(plan.data, student.tokenizer, samples=wanted, tokens=plan.tokens, seed=seed, loss_on=loss_on)
    if len(drawn) < 2:
        raise InputError(f"'{plan.data}' gives one usable sample; expected one to train on and one to judge by")
    apart = max(1, round(plan.held_out * len(drawn)))
    return drawn[: len(drawn) - apart], drawn[len(drawn) - apart :]


def _teacher(
    source: str,
    offline: Path | None,
    top_k: int,
    precision: str,
    device: str,
    trust_remote_code: bool,
    student: Loaded,
    samples: Samples,
    settings: Settings,
) -> Teacher:
    """The original in memory, or a recording of it, made now where it is not there."""
    from excise.cli.terminal import status, tokens_progress
    from excise.healing.heal import require_same_vocabulary
    from excise.healing.origin import origin_of
    from excise.healing.teachers import INDEX, OfflineTeacher, OnlineTeacher, load_teacher, record_teacher

    if offline is not None and (offline / INDEX).exists():
        return OfflineTeacher.open(offline, samples)
    if not source:
        raise InputError(f"{offline} holds no finished recording; pass --teacher ORIGINAL to make one")
    with status(f"loading {source}"):
        loaded = load_teacher(source, precision, device=device, trust_remote_code=trust_remote_code)
    require_same_vocabulary(student.stack, loaded.stack)
    online = OnlineTeacher(loaded.stack, settings.temperature, precision)
    origin_of(student, online)  # which refuses a wrong one, before it is recorded
    if offline is None:
        return online
    with tokens_progress("recording the teacher", samples.tokens) as advance:
        record_teacher(loaded.stack, samples, offline, k=top_k, temperature=settings.temperature, advance=advance)
    del loaded, online
    gc.collect()
    return OfflineTeacher.open(offline, samples)
