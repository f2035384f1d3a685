"""Healing: training a pruned model to predict what the original does, on `transformers.Trainer`.

Accumulation, several processes (`torchrun`, `accelerate launch`), sharding and logging are the trainer's own; the loss
is the student's forward pass (`excise.healing.student`). Checkpoints count only once they carry a mark that is written
last, so that a process killed at any point goes on from the newest whole one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from excise.data.batches import pad
from excise.data.fit import require_fit
from excise.data.samples import Sample, Samples
from excise.errors import InputError
from excise.healing.checkpoints import Mark, last_named, last_whole, step_of
from excise.healing.origin import Origin
from excise.healing.settings import Settings
from excise.healing.sharding import require_sharded, sharding_options
from excise.healing.student import counterparts_of, distilling, trainable, without_dropout
from excise.healing.teachers import OfflineTeacher, Teacher
from excise.healing.trackers import Tracking
from excise.models.identity import model_identity
from excise.models.stack import Stack
from excise.plain import Facts
from excise.store import Journal, Store
from excise.team import launched


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step.

    Attributes:
        step: optimiser steps done, of `steps`.
        steps: planned.
        loss: of the step, nats per token.
        tokens_per_second: since this process started training, over all processes.
        seconds_left: at that speed.

    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Watching:
    """Who is told of a training's progress.

    Attributes:
        report: called after every optimiser step.
        tracking: trackers that get the curve.

    """

    report: Callable[[Progress], None] | None = None
    tracking: Tracking = field(default_factory=Tracking)


def train(
    student: Stack,
    teacher: Teacher,
    samples: Samples,
    work: str | Path,
    settings: Settings,
    *,
    origin: Origin | None = None,
    until: int | None = None,
    watching: Watching | None = None,
) -> list[dict[str, float]]:
    """Train a student in place, going on from the last whole checkpoint in `work` if there is one.

    Samples beyond a multiple of the batch are left out, so that all steps weigh the same and any number of processes
    takes the same ones.

    Args:
        student: the pruned model, in float32 (or float64); its weights change.
        teacher: what it learns from.
        samples: to train on, at least one batch of them.
        work: folder for checkpoints and the key that tells runs apart; deleted by the caller once the result is kept.
        settings: hyper-parameters.
        origin: the student's place in the original; needed for the hidden-state term and for training cuts alone.
        until: stop after this step, with a checkpoint from which a later call goes on as if it had not stopped.
        watching: who is told of its progress.

    Returns:
        The curve: one entry per optimiser step, with "step", "loss" (nats per token), "learning_rate" and "grad_norm".

    Raises:
        HealingError: the loss is not finite, or a checkpoint could not be written; names the last whole one.
        InputError: there are too few samples, or the settings need something that the teacher or the origin lacks.
        OutputError: `work` holds a run with other settings, another model or other data.

    """
    work, watching = Path(work), watching or Watching()
    _check(student, teacher, samples, settings, origin)
    # Refuses the folder of another training.
    Journal(work, training_key(student, teacher, samples, settings))
    whole = samples[: len(samples) - len(samples) % settings.batch]
    counterparts = counterparts_of(origin.original_blocks, origin.teacher_blocks) if origin else ()
    with _quiet(), _restored(student), last_named(work), distilling(student, teacher, settings, counterparts):
        total, tokens_per_step = planned_steps(settings, len(samples)), whole.tokens / len(whole) * settings.batch
        arguments = _arguments(student, work, settings, total, watching.tracking)
        blocks = (origin.original_blocks, origin.teacher_blocks) if origin else (None, len(student.blocks))
        model = trainable(student, settings, *blocks)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Numbered(whole),
            data_collator=_side_by_side,
            callbacks=[Mark(), _Report(tokens_per_step, watching.report), _StopAfter(until)],
        )
        # Without bars the trainer prints every log entry to standard output, where `--json` has its result.
        trainer.remove_callback(PrinterCallback)
        require_sharded(trainer, settings.train)
        # Others look only when the leftovers are gone, or two processes would start from different checkpoints.
        with arguments.main_process_first(desc="clearing what an interruption left"):
            last = last_whole(work, clear=arguments.process_index == 0)
        # At its end already: the trainer would take a step too many.
        if last is not None and step_of(last) >= (until or total):
            trainer._load_from_checkpoint(str(last))
            trainer.state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if settings.train == "lora":
            model.merge_and_unload()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def training_key(student: Stack, teacher: Teacher, samples: Samples, settings: Settings) -> Facts:
    """Everything that a training depends on; the student as it is before."""
    facts = {"settings": asdict(settings), "samples": samples.hash, "teacher": teacher.describe()}
    return {"stage": "heal", "student": model_identity(student.model), **facts}


def training_place(store: Store, student: Stack, teacher: Teacher, samples: Samples, settings: Settings) -> Path:
    """Where a store keeps a training.

    Raises:
        InputError: the store has no folder.

    """
    place = store.place("trainings", training_key(student, teacher, samples, settings))
    if place is None:
        raise InputError("a training writes checkpoints; expected a store with a folder")
    return place


def planned_steps(settings: Settings, samples: int) -> int:
    """Optimiser steps that `train` takes on so many samples."""
    return settings.steps or math.ceil(settings.epochs * (samples // settings.batch))


def _check(student: Stack, teacher: Teacher, samples: Samples, settings: Settings, origin: Origin | None) -> None:
    require_fit(samples, student)
    if len(samples) < settings.batch:
        raise InputError(f"expected at least one batch of {settings.batch} samples to train on, got {len(samples)}")
    require_divisible(settings)
    if settings.hidden > 0 and isinstance(teacher, OfflineTeacher):
        raise InputError(
            "a recorded teacher has no hidden states; leave out the hidden-state term, or load the teacher"
        )
    if settings.hidden > 0 and origin is None:
        raise InputError(
            "the hidden-state term needs to know which of the original's blocks the student has; expected a checkpoint "
            "of `excise prune`, whose excise.json says so"
        )
    if teacher.temperature != settings.temperature:
        raise InputError(
            f"the teacher's temperature is {teacher.temperature:g}, that of the settings {settings.temperature:g}; "
            f"use one for both"
        )
    if origin is not None and len(origin.original_blocks) != len(student.blocks):
        raise InputError(
            f"its recipe names {len(origin.original_blocks)} blocks, the student has {len(student.blocks)}; "
            f"excise.json does not belong to this checkpoint"
        )


def _arguments(student: Stack, work: Path, settings: Settings, total: int, tracking: Tracking) -> TrainingArguments:
    share = settings.batch // launched()[1]
    micro = next(size for size in range(min(settings.micro_batch, share), 0, -1) if share % size == 0)
    on_cpu = student.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        # Of the whole training, also where `until` stops it: an entrant of the race follows the schedule it would go on
        # with.
        max_steps=total,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        # 0.10 s per step of 145M parameters on one core, where the default takes 0.67 (log, 2026-11-24, healing, one
        # optimiser).
        optim="adamw_torch_fused",
        bf16=settings.precision == "bf16-mixed",
        activation_checkpointing=settings.checkpointing,
        seed=settings.seed,
        data_seed=settings.seed,
        # The trainer would move a model that was loaded on the CPU to any GPU it sees, away from its teacher.
        use_cpu=on_cpu,
        # The default for processes with GPUs, NCCL, knows no CPU.
        ddp_backend="gloo" if on_cpu and launched()[1] > 1 else None,
        # Every step: the curve and the report have no other source.
        logging_steps=1,
        # The filter would put the average of earlier losses in place of one that is not finite.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        # One is not enough: the trainer deletes the older checkpoint before the newer one has its mark.
        save_total_limit=2,
        # The forward pass is ours, and all that the collator gives is meant for it.
        remove_unused_columns=False,
        # Pinning without a GPU is a warning per loader and no gain.
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to=tracking.opened(),
        **sharding_options(),
    )
    # One process trains one model; more of them come with torchrun. DataParallel's copies would all run this one's
    # forward.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def require_divisible(settings: Settings) -> None:
    """Refuse a batch that the processes of this job cannot share evenly.

    Raises:
        InputError: it cannot be divided among them.

    """
    if settings.batch % launched()[1]:
        raise InputError(f"a batch of {settings.batch} samples cannot be divided among {launched()[1]} processes")


class _Numbered(Dataset):
    """Samples with their numbers, by which a recorded teacher finds its rows."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[int, Sample]:
        return number, self.samples[number]


def _side_by_side(items: Sequence[tuple[int, Sample]]) -> dict[str, Tensor]:
    numbers, samples = zip(*items, strict=True)
    batch = pad(samples, numbers)
    labels = {
        "labels": batch.labels,
        "shift_labels": batch.labels,
    }  # the trainer counts in the latter if both are there
    return {"input_ids": batch.input_ids, **labels, "samples": batch.lengths.new_tensor(numbers), "real": batch.real}


class _Report(TrainerCallback):
    """Reports progress after every step; tokens are counted by the samples' mean length."""

    def __init__(self, tokens_per_step: float, report: Callable[[Progress], None] | None) -> None:
        self.tokens_per_step, self.report = tokens_per_step, report

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first, self.started = state.global_step, time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.report is None or "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        # Since this process began: steps before an interruption took another process's time.
        speed = (state.global_step - self.first) / (time.perf_counter() - self.started)
        left = (state.max_steps - state.global_step) / speed
        self.report(Progress(state.global_step, state.max_steps, logs["loss"], speed * self.tokens_per_step, left))


class _StopAfter(TrainerCallback):
    """Stops a training early, after a checkpoint; None lets it run to its end."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.step is not None and state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def _restored(student: Stack) -> Iterator[None]:
    """Put back what training changes in a model beside its weights."""
    model = student.model
    use_cache, requires_grad = model.config.use_cache, [(p, p.requires_grad) for p in model.parameters()]
    try:
        with without_dropout(model):
            yield
    finally:
        model.eval()
        model.activation_checkpointing_disable()
        model.config.use_cache = use_cache
        for parameter, wanted in requires_grad:
            parameter.requires_grad_(wanted)
            # Gradients take as much memory as the weights, and nobody needs them now.
            parameter.grad = None
        # The fused optimiser and LoRA's merge write past the version counters, by which `model_identity` knows weights.
        torch.autograd.graph.increment_version([parameter for parameter, _ in requires_grad])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the trainer's own talk: progress is reported, and what matters is raised."""
    level, bar = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
