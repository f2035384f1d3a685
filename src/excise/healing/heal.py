"""From a pruned checkpoint and a teacher to a healed checkpoint with its evidence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from excise.artefacts import atomic_path, read_json, write_json
from excise.context import Context
from excise.data.batches import longest_together
from excise.data.samples import Samples
from excise.drawing.chart import write_chart
from excise.drawing.loss_curves import loss_curves
from excise.errors import InputError, OutputError, UntestableError
from excise.healing.settings import Settings
from excise.healing.teachers import OnlineTeacher, Teacher
from excise.healing.trainer import Origin, Watching, last_whole, train, training_place
from excise.measuring.measure import measure
from excise.models.loading import Loaded
from excise.models.stack import Stack, find_stack
from excise.provenance import provenance
from excise.store import Store
from excise.surgery.card import model_card, original_metadata
from excise.surgery.checkpoint import RECIPE, write_pruned
from excise.surgery.feasible import require_writable
from excise.surgery.self_test import self_test
from excise.surgery.verdict import require_passed

MANIFEST, CURVE = "heal.json", "loss.svg"


def heal(
    student: Loaded,
    teacher: Teacher,
    samples: Samples,
    held_out: Samples,
    out: str | Path,
    settings: Settings,
    *,
    store: Store | None = None,
    further: Mapping[str, Any] | None = None,
    force: bool = False,
    watching: Watching | None = None,
) -> dict[str, Any]:
    """Train a pruned model to predict what its original does, and write it as an ordinary checkpoint.

    The folder appears when all is done: the checkpoint, `heal.json` and the loss curve. Until then the training lies
    in the store; the same call goes on from there.

    Args:
        student: the pruned model as loaded from its checkpoint, in float32; its weights change.
        teacher: the original, or a recording of it.
        samples: to train on.
        held_out: other samples, on which the loss is measured before and after.
        out: folder to write.
        settings: hyper-parameters.
        store: for the unfinished training, deleted at the end; by default `.NAME.work` beside `out`. That of a race
            lets the winner go on.
        further: other facts for `heal.json`.
        force: replace a checkpoint in `out`.
        watching: who is told of its progress.

    Returns:
        What is written to `heal.json`. In a process other than the first of several: an empty dictionary.

    Raises:
        OutputError: `out` exists.
        HealingError: training cannot go on; names the last whole checkpoint.
        InputError: see `excise.healing.trainer.train`.

    """
    out, started = Path(out).expanduser(), time.perf_counter()
    check_destination(out, student.source, force)
    require_writable(student.folder, out, changes=student.stack.model, overwrite=force)
    recipe = recipe_of(student.source)
    store = store or Store(out.with_name(f".{out.name}.work"))
    work = training_place(store, student.stack, teacher, samples, settings)
    losses = {}
    if isinstance(teacher, OnlineTeacher):
        losses["original"] = _loss(Loaded.of(teacher.stack), held_out)
    losses["pruned"] = _loss(student, held_out)
    curve = train(
        student.stack,
        teacher,
        samples,
        work,
        settings,
        origin=Origin.of(recipe),
        watching=watching,
    )
    if not PartialState().is_main_process:
        PartialState().wait_for_everyone()
        return {}
    student = _whole(student, work)
    losses["healed"] = _loss(student, held_out)
    facts = {
        "student": student.source,
        "losses": losses,
        "steps": len(curve),
        "settings": asdict(settings),
        "teacher": teacher.describe(),
        "samples": samples.describe(),
        "held_out": held_out.describe(),
        "curve": curve,
        **(further or {}),
        "provenance": provenance(),
    }
    facts = _write(student, recipe, facts, out, longest_together(held_out), started)
    store.delete()
    PartialState().wait_for_everyone()
    return facts


def _whole(student: Loaded, work: Path) -> Loaded:
    """The student as trained; read back from the last checkpoint where its weights are spread over processes."""
    if AcceleratorState().distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return student
    model = AutoModelForCausalLM.from_pretrained(str(last_whole(work)), dtype=torch.float32)
    return replace(student, stack=find_stack(model))


def recipe_of(source: str) -> dict[str, Any]:
    """The recipe of a pruned checkpoint's folder; empty where it has none."""
    path = Path(source).expanduser() / RECIPE
    return read_json(path) if path.is_file() else {}


def check_destination(out: Path, student: str, force: bool) -> None:
    """Refuse a folder that healing must not write to; touches nothing.

    Raises:
        OutputError: it is the student's own, a file, no checkpoint, or one that is not to be replaced.

    """
    if not out.exists():
        return
    if Path(student).expanduser().exists() and Path(student).expanduser().resolve() == out.resolve():
        raise OutputError(f"{out} is the pruned model itself; choose another --out")
    if not (out / "config.json").is_file():
        raise OutputError(f"{out} exists and is not a checkpoint; it is not replaced, choose another --out")
    if not force:
        raise OutputError(f"{out} exists; choose another --out, or pass --force to replace it")


def _loss(loaded: Loaded, samples: Samples) -> float:
    return measure(Context(loaded), samples, [()]).loss()


def _write(
    student: Loaded, recipe: Mapping[str, Any], facts: Mapping[str, Any], out: Path, probe: torch.Tensor, started: float
) -> dict[str, Any]:
    """Write the checkpoint, its card, its curve and its facts as one folder, after its self-test; returns the facts."""
    told = {key: facts[key] for key in ("losses", "steps", "settings")}
    whole = {**recipe, "healing": {**told, "samples": facts["samples"], "teacher": facts["teacher"]}}
    with atomic_path(out) as folder:
        written = write_pruned(
            student.stack,
            (),
            folder,
            source=student.folder,
            tokenizer=student.tokenizer,
            dtype=student.stored_dtype,
            card={"original": student.source},
        )
        facts = {**facts, "self_test": require_passed(_tested(student.stack, folder, probe), out)}
        if not recipe:
            whole = {**whole, **written}
        write_json(folder / RECIPE, {**whole, "dtype": written["dtype"]})
        metadata = original_metadata(student.folder or student.source)
        card = model_card(whole, name=out.name, original=metadata) + _section(facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        held_out = ", ".join(f"{name} {value:.3f}" for name, value in facts["losses"].items())
        if chart := loss_curves({out.name: facts["curve"]}, f"Held out, nats/token: {held_out}."):
            write_chart(chart, folder / CURVE)
        facts["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / MANIFEST, facts)
    return facts


def _tested(student: Stack, folder: Path, probe: torch.Tensor) -> dict[str, Any]:
    try:
        return self_test(student, (), folder, probe)
    except UntestableError as error:
        return {"level": "none", "reason": str(error)}


def _section(facts: Mapping[str, Any]) -> str:
    losses, settings, teacher = facts["losses"], facts["settings"], facts["teacher"]
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in losses.items())
    trained = {"all": "all parameters", "lora": "LoRA, merged", "cuts": "the blocks next to a cut"}[settings["train"]]
    return (
        f"\n## Healing\n\nTrained by distillation from the original ({teacher['kind']} teacher): {facts['steps']} "
        f"steps of {settings['batch']} samples, AdamW at {settings['learning_rate']:g}, {trained}.\n\n"
        f"| model | held-out loss, nats/token |\n|---|---|\n{rows}"
    )


def require_same_vocabulary(student: Stack, teacher: Stack) -> None:
    """Refuse a teacher that does not predict the student's tokens.

    Raises:
        InputError: their vocabularies differ in size.

    """
    sizes = [stack.model.config.get_text_config().vocab_size for stack in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}; expected the student's own original"
        )
