"""`excise heal`: distil the original into a pruned model."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import MADE_BY, json_text
from excise.cli.healing import preset_of, print_healed, print_race, training_bar
from excise.errors import InputError
from excise.healing.settings import Settings
from excise.plain import Facts
from excise.run import RunSettings
from excise.settings import PLACEMENTS, Placement, Printing, Replacing, Sampling, borrowing, changed, names_in, option
from excise.team import launched, rank_here

if TYPE_CHECKING:
    from excise.data import Samples
    from excise.healing.settings import Preset
    from excise.healing.teachers import Teacher
    from excise.models.loading import Loaded


@dataclass(frozen=True, kw_only=True)
@borrowing(Settings)
class HealSettings(Replacing, Printing, Placement):
    """Settings of `excise heal`; those of the training, and of the data, change the preset where they are given."""

    divides = "itself"

    pruned: tuple[str, ...] = option(
        ..., "The pruned checkpoint's folder; several race, and the winner is healed.", argument=True, reads="path"
    )
    out: Path = option(..., "Folder for the healed checkpoint.", group="Output", writes="folder")
    teacher: str = option("", "The original: a folder, a .gguf file or a hub id.", reads="path")
    offline: Path | None = option(
        None, "Folder of the teacher's top-k log-probabilities; computed once if they are not there."
    )
    top_k: int = option(64, "Tokens that such a recording keeps at each position.", least=1)
    teacher_precision: str | None = option(
        None,
        "auto, float32, bfloat16, or int8 or nf4 through bitsandbytes.",
        choices=names_in("excise.healing.teachers:PRECISIONS"),
    )
    teacher_placement: str = option(
        "auto",
        "With --offline: streamed records the teacher a block at a time from the disk; auto: as it fits.",
        choices=PLACEMENTS,
    )
    preset: str = option(
        "small",
        "small, paper-llama or paper-qwen; options change it.",
        choices=names_in("excise.healing.settings:PRESETS"),
    )
    data: str | None = option(None, "Source of the samples, as for the other verbs.", group="Data", reads="data")
    samples: int | None = option(None, "Samples drawn, held-out ones included.", group="Data", least=2)
    tokens: int | None = option(None, "Longest sample, in tokens.", group="Data", least=2)
    held_out: float | None = option(None, "Share of the samples kept apart.", group="Data", above=0, below=1)
    loss_on: str = changed(Sampling, "loss_on")
    report_to: tuple[str, ...] = changed(RunSettings, "heal_report_to", group="Output", hidden=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher and self.offline is None:
            raise InputError("expected --teacher ORIGINAL, --offline FOLDER, or both")
        if self.teacher_placement == "streamed" and self.offline is None:
            raise InputError("a streamed teacher is recorded before training: pass --offline FOLDER too")
        self._require_fair()

    def _require_fair(self) -> None:
        """Refuse a race on the words of one of those that race."""
        if len(self.pruned) < 2 or self.data is None:
            return
        from excise.data.sources import asks_model

        if asks_model(self.data):
            raise InputError(
                f"'{self.data}' are the words of a pruned model, and {len(self.pruned)} race, which must train and be "
                f"judged on the same; name other data, or heal them one by one"
            )

    def plan(self) -> Preset:
        """The preset, changed by what was given."""
        given = ("data", "samples", "tokens", "held_out", *(field.name for field in fields(Settings)))
        changes = {name: getattr(self, name) for name in given}
        return preset_of(self.preset, {**changes, "teacher": self.teacher_precision})


def heal(settings: HealSettings) -> None:
    """Train a pruned model to predict what its original does; an interrupted training goes on.

    Of several pruned models, all train for a while, the worse half is dropped, and so on until one is left.
    """
    from excise.healing.heal import heal as heal_model
    from excise.healing.trackers import Tracking

    pruned, out = settings.pruned, settings.out
    plan, tracking = settings.plan(), Tracking(settings.report_to, out.with_name(f"{out.name}-tensorboard"))
    from excise.cli.terminal import load_model
    from excise.healing.trainer import Watching
    from excise.job import made_by
    from excise.store import Store
    from excise.surgery.feasible import require_writable

    place = _own_device(settings.device)
    open_student = partial(load_model, dtype="float32", device=place, trust_remote_code=settings.trust_remote_code)
    student = open_student(pruned[0])
    require_writable(student.folder, out, changes=student.stack.model, overwrite=settings.force)
    drawn, apart = _samples(plan, student, settings.loss_on)
    said = _teacher(settings, plan, place, student, drawn)
    options: Facts = {"force": settings.force, "further": {MADE_BY: made_by(settings)}}
    store = Store(out.with_name(f".{out.name}.work"))
    if len(pruned) > 1:
        from excise.choosing.judged import halves
        from excise.healing.race import race

        # The winner's loss on samples by which it won would be partly luck.
        choosing, apart = halves(apart)
        with training_bar() as report:
            result = race(
                pruned, said, drawn, choosing, store, plan.settings,
                open_student=open_student, report=lambda name, progress: report(progress, Path(name).name),
            )  # fmt: skip
        student = open_student(result.winner.student)
        options["further"]["race"] = result.describe()
    with training_bar() as report:
        watching = Watching(report, tracking)
        facts = heal_model(student, said, drawn, apart, out, plan.settings, store=store, watching=watching, **options)
    if not facts:
        return
    if settings.as_json:
        typer.echo(json_text({"out": str(out), **facts}))
        return
    print_race(facts.get("race", {}).get("standings", ()), lambda standing: standing["student"])
    print_healed(out, facts)


def _own_device(device: str) -> str:
    """One GPU per process where several train together, on one machine or each on its own; else as asked."""
    import torch

    return f"cuda:{rank_here()}" if device == "auto" and launched()[1] > 1 and torch.cuda.is_available() else device


def _samples(plan: Preset, student: Loaded, loss_on: str) -> tuple[Samples, Samples]:
    from excise.data import Fit, load_samples, own_answers

    wanted = plan.samples or sys.maxsize
    drawn = load_samples(
        plan.data,
        student.tokenizer,
        samples=wanted,
        tokens=plan.tokens,
        seed=plan.settings.seed,
        loss_on=loss_on,
        fit=Fit.of(student.stack),
        own=own_answers(student),
    )
    if len(drawn) < 2:
        raise InputError(f"'{plan.data}' gives one usable sample; expected one to train on and one to judge by")
    apart = max(1, round(plan.held_out * len(drawn)))
    return drawn[: len(drawn) - apart], drawn[len(drawn) - apart :]


def _teacher(settings: HealSettings, plan: Preset, device: str, student: Loaded, samples: Samples) -> Teacher:
    """The original in memory, or a recording of it, made now where it is not there."""
    from excise.cli.terminal import status, tokens_progress
    from excise.context import Context
    from excise.healing.heal import require_same_vocabulary
    from excise.healing.origin import origin_of
    from excise.healing.teachers import INDEX, OfflineTeacher, OnlineTeacher, load_teacher, record_teacher
    from excise.progress import Progress

    source, offline, temperature = settings.teacher, settings.offline, plan.settings.temperature
    if offline is not None and (offline / INDEX).exists():
        return OfflineTeacher.open(offline, samples)
    if not source:
        raise InputError(f"{offline} holds no finished recording; pass --teacher ORIGINAL to make one")
    with status(f"loading {source}"):
        loaded = load_teacher(
            source,
            plan.teacher,
            device=device,
            trust_remote_code=settings.trust_remote_code,
            # One that teaches step by step is wanted whole at every step.
            placement=settings.teacher_placement if offline is not None else "resident",
        )
    require_same_vocabulary(student.stack, loaded.stack)
    online = OnlineTeacher(loaded.stack, temperature, plan.teacher)
    # Refuses a wrong one before it is recorded.
    origin_of(student, online)
    if offline is None:
        return online
    context = Context(loaded, progress=Progress(tokens_progress))
    record_teacher(context, samples, offline, k=settings.top_k, temperature=temperature)
    del loaded, online, context
    gc.collect()
    return OfflineTeacher.open(offline, samples)
