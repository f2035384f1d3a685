"""Hyper-parameters of healing, and the presets that are the paper's runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from excise.settings import MOST_SEED, check, option

TRAIN = ("all", "lora", "cuts", "refitted", "last")
PRECISIONS = ("float32", "bf16-mixed")


@dataclass(frozen=True)
class Settings:
    """How to train; every field says what it is, and is checked, by its `option`."""

    learning_rate: float = option(
        2e-4,
        "Peak learning rate of AdamW, after warm-up; it then falls to 0 along a cosine.",
        flag="--lr",
        group="Healing",
        above=0,
    )
    batch: int = option(8, "Samples per optimiser step, over all processes and accumulation.", group="Healing", least=1)
    micro_batch: int = option(4, "Most samples that a process pushes through at once.", group="Healing", least=1)
    epochs: float = option(1.0, "Passes over the samples, where --steps is not given.", group="Healing", above=0)
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", group="Healing", least=1)
    warmup: float = option(0.05, "Steps of linear warm-up; below 1, a share of all steps.", group="Healing", least=0)
    weight_decay: float = option(1e-4, "AdamW's weight decay.", group="Healing", least=0)
    clip: float = option(1.0, "Largest norm of the gradient.", group="Healing", above=0)
    temperature: float = option(1.0, "Temperature of the divergence.", group="Healing", above=0)
    cross_entropy: float = option(
        0.0,
        "Weight of the next token's cross-entropy beside the divergence.",
        group="Healing",
        least=0,
    )
    hidden: float = option(
        0.0,
        "Weight of the relative squared distance of residual streams.",
        group="Healing",
        least=0,
    )
    train: str = option(
        "all",
        "all parameters; lora, low-rank updates of every matrix in the blocks, merged at the end; cuts, the blocks "
        "next to a cut; refitted, what a repair refits and the gains of norms; last, the last three blocks and the "
        "head.",
        group="Healing",
        choices=TRAIN,
    )
    lora_rank: int = option(16, "Rank of LoRA's updates.", group="Healing", least=1)
    precision: str = option(
        "float32",
        "float32, or bf16-mixed: weights in float32, products in bfloat16.",
        group="Healing",
        choices=PRECISIONS,
    )
    checkpointing: bool = option(False, "Recompute blocks in the backward pass to save memory.", group="Healing")
    seed: int = option(
        0, "Seed of the draw and order of the samples, and of LoRA's start.", group="Healing", least=0, most=MOST_SEED
    )
    save_every: int = option(50, "Optimiser steps between checkpoints.", group="Healing", least=1)

    def __post_init__(self) -> None:
        check(self)


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
