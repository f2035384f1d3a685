"""Hyper-parameters of healing, and the presets that are the paper's runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from excise.errors import InputError

TRAIN = ("all", "lora", "cuts")
PRECISIONS = ("float32", "bf16-mixed")


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        learning_rate: peak of AdamW's, after warm-up; it then falls to 0 along a cosine.
        batch: samples an optimiser step, over all processes and accumulation.
        micro_batch: most samples that a process pushes through at once.
        epochs: passes over the samples, where `steps` is not given.
        steps: optimiser steps.
        warmup: steps of linear warm-up; below 1, a share of all steps.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        temperature: T of the divergence.
        cross_entropy: weight of the next token's cross-entropy beside the divergence.
        hidden: weight of the relative squared distance of residual streams, see `excise.healing.losses.hidden_loss`.
        train: "all" parameters; "lora", low-rank updates of every matrix in the blocks, merged at the end; or "cuts",
            the blocks next to a cut.
        lora_rank: of each update.
        precision: "float32", or "bf16-mixed": weights in float32, products in bfloat16.
        checkpointing: recompute blocks in the backward pass to save memory.
        seed: of the order of the samples and of LoRA's start.
        save_every: optimiser steps between checkpoints.

    """

    learning_rate: float = 2e-4
    batch: int = 8
    micro_batch: int = 4
    epochs: float = 1.0
    steps: int | None = None
    warmup: float = 0.05
    weight_decay: float = 1e-4
    clip: float = 1.0
    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    train: str = "all"
    lora_rank: int = 16
    precision: str = "float32"
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        positive = {
            "learning_rate": self.learning_rate,
            "batch": self.batch,
            "micro_batch": self.micro_batch,
            "epochs": self.epochs,
            "steps": 1 if self.steps is None else self.steps,
            "clip": self.clip,
            "temperature": self.temperature,
            "lora_rank": self.lora_rank,
            "save_every": self.save_every,
        }
        wrong = {name: value for name, value in positive.items() if not value > 0}
        not_negative = ("warmup", "weight_decay", "cross_entropy", "hidden")
        wrong |= {name: getattr(self, name) for name in not_negative if not getattr(self, name) >= 0}
        if wrong:
            raise InputError(
                f"healing settings must be positive (warmup, decay and loss weights may be 0), got {wrong}"
            )
        if self.train not in TRAIN or self.precision not in PRECISIONS:
            raise InputError(
                f"expected train in {TRAIN} and precision in {PRECISIONS}, got '{self.train}' and '{self.precision}'"
            )


@dataclass(frozen=True)
class Preset:
    """Settings, and the data and teacher that go with them.

    Attributes:
        settings: how to train.
        data: source of the samples, see `excise.data.load_samples`.
        samples: how many; None takes what the source has.
        tokens: longest sample.
        held_out: share of the samples kept apart.
        teacher: precision of the teacher, see `excise.healing.teachers.load_teacher`.

    """

    settings: Settings
    data: str = "starter"
    samples: int | None = 240
    tokens: int = 256
    held_out: float = 0.1
    teacher: str = "auto"


_PAPER = Settings(warmup=100, weight_decay=1e-4, clip=1.0, temperature=1.0, precision="bf16-mixed", seed=42)
_PAPER_DATA = Preset(_PAPER, "teknium/OpenHermes-2.5", None, 1024, 0.01, "nf4")

PRESETS: dict[str, Preset] = {
    "small": Preset(Settings()),
    "paper-llama": replace(_PAPER_DATA, settings=replace(_PAPER, learning_rate=2e-5, batch=64, epochs=1.0)),
    "paper-qwen": replace(_PAPER_DATA, settings=replace(_PAPER, learning_rate=1e-4, batch=16, epochs=0.5)),
}
