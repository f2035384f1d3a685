"""The student: a pruned model whose forward pass is the distillation loss, and which of its weights learn."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from excise.errors import ArchitectureError, HealingError, InputError, MissingExtraError
from excise.healing.losses import hidden_loss, vocabulary_loss
from excise.healing.settings import Settings
from excise.healing.teachers import Teacher
from excise.models.stack import SCALE, Block, Stack, override_forward
from excise.plain import Plain
from excise.repair.cuts import folds_of
from excise.repair.folds import Fold, Projection
from excise.repair.streams import recorded_streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# As in "Reassessing layer pruning" (ICLR 2026), which drops the last blocks and trains the three below and the head.
LAST = 3


def distilling(
    student: Stack, teacher: Teacher, settings: Settings, counterparts: Sequence[int]
) -> AbstractContextManager[None]:
    """Context in which calling the student's model gives its distillation loss.

    The loss is computed inside the model's own forward, head and all: so wrappers of data-parallel and sharded training
    see an ordinary call of an ordinary model.

    Args:
        student: the pruned model.
        teacher: what it learns from.
        settings: temperature and weights of the loss.
        counterparts: [student's blocks], see `counterparts_of`; read only where the hidden-state term has a weight.

    """
    places = dict(enumerate(counterparts)) if settings.hidden > 0 else {}

    def forward(
        input_ids: Tensor,
        shift_labels: Tensor,
        samples: Tensor,
        real: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        lesson = teacher.lesson(input_ids, shift_labels, samples.tolist(), sorted(places.values()))
        with recorded_streams(student, sorted(places)) as streams:
            hidden = student.hidden(input_ids)
        loss = vocabulary_loss(
            student,
            hidden,
            shift_labels,
            lesson.targets,
            temperature=settings.temperature,
            cross_entropy=settings.cross_entropy,
        )
        total = loss.total
        if places:
            goals = {place: lesson.streams[block] for place, block in places.items()}
            total = total + settings.hidden * hidden_loss(streams, goals, real)
        # Before the backward pass: the weights are still those of the last good step.
        if not torch.isfinite(total):
            raise HealingError(f"the loss became {total.item()}")
        count = max(1, loss.count) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    return override_forward({student.model: forward})


def counterparts_of(original_blocks: Sequence[int], teacher_blocks: int) -> tuple[int, ...]:
    """The teacher's block after which its stream is what the student's should be after each of its blocks.

    Where blocks were removed above one, it is the topmost of those: the student's next block expects its output.

    Examples:
        >>> counterparts_of([0, 1, 4, 5], teacher_blocks=7)
        (0, 3, 4, 6)

    """
    return tuple(above - 1 for above in (*original_blocks[1:], teacher_blocks))


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Context in which no activation is dropped: the teacher's are not, and a pruned model has no capacity to spare."""
    changed: list[tuple[Any, str, float]] = []
    for module in model.modules():
        # Attention modules hold their rates as plain numbers, under one of these names.
        names = ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout", "resid_attn_dropout")
        changed += [(module, name, getattr(module, name)) for name in names if _is_rate(getattr(module, name, None))]
    try:
        for module, name, _ in changed:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in changed:
            setattr(module, name, rate)


def _is_rate(value: Plain) -> bool:
    return isinstance(value, float) and value > 0


def cut_blocks(original_blocks: Sequence[int], teacher_blocks: int) -> tuple[int, ...]:
    """The student's blocks next to a cut, by their place in the student.

    Examples:
        >>> cut_blocks([0, 1, 4, 5], teacher_blocks=7)
        (1, 2, 3)

    """
    edges = (-1, *original_blocks, teacher_blocks)
    pairs = [(edge - 2, edge - 1) for edge in range(1, len(edges)) if edges[edge] - edges[edge - 1] > 1]
    return tuple(sorted({p for pair in pairs for p in pair if 0 <= p < len(original_blocks)}))


def trainable(student: Stack, settings: Settings, original_blocks: Sequence[int] | None, teacher_blocks: int) -> Any:
    """Choose the weights that learn, and return the model to give to the trainer.

    Args:
        student: the pruned model; its weights' `requires_grad` is set, and LoRA's updates are put in.
        settings: `train` says which.
        original_blocks: the student's blocks by their index in the original, where they are known.
        teacher_blocks: number of the original's blocks.

    Raises:
        InputError: "cuts" or "refitted" is asked for, and nobody knows where they are, or no matrix is there to learn.
        MissingExtraError: "lora" is asked for, and peft is not installed.

    """
    model = student.model
    if settings.train == "lora":
        return _with_lora(model, settings)
    model.requires_grad_(settings.train == "all")
    if settings.train == "last":
        for block in student.blocks[-LAST:]:
            block.module.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    if settings.train in ("cuts", "refitted"):
        if original_blocks is None or not (places := cut_blocks(original_blocks, teacher_blocks)):
            raise InputError(
                f"training '{settings.train}' needs to know the cuts; expected a checkpoint of `excise prune`, whose "
                f"excise.json names them"
            )
        if settings.train == "refitted":
            _refitted_learn(student, places)
        else:
            for place in places:
                student.blocks[place].module.requires_grad_(True)
    return model


def _refitted_learn(student: Stack, places: Sequence[int]) -> None:
    """What a repair would refit in the blocks next to cuts, and every norm's gain."""
    for name, parameter in student.model.named_parameters():
        # Of parameters with one dimension only gains are called so; others are biases, decays, sinks.
        parameter.requires_grad_(parameter.ndim == 1 and name.rpartition(".")[-1] == "weight")
    found = folds_of(student, places, None)
    learning = [parameter for place in places for parameter in _refitted(student.blocks[place], found[place], student)]
    if not learning:
        reason = next((f"; {folds}" for folds in found.values() if isinstance(folds, ArchitectureError)), "")
        raise InputError(f"no block next to a cut has a matrix that repair refits, so train 'cuts' or 'all'{reason}")
    for parameter in learning:
        parameter.requires_grad_(True)


def _refitted(block: Block, folds: list[Fold] | ArchitectureError, student: Stack) -> list[nn.Parameter]:
    """The matrix that a repair would refit; where it would scale channels alone, all that make the output."""
    if not isinstance(folds, ArchitectureError) and isinstance(folds[-1], Projection):
        return [student.model.get_parameter(name) for name in folds[-1].names]
    last = next(sublayer for sublayer in reversed(block.sublayers) if sublayer.kind != SCALE)
    return [block.module.get_parameter(name) for name in last.writes]


def _with_lora(model: PreTrainedModel, settings: Settings) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("LoRA needs peft; pip install 'excise[heal]', or train all parameters")
    from peft import LoraConfig, get_peft_model

    # LoRA's first matrices are drawn here, before the trainer sets its seed.
    torch.manual_seed(settings.seed)
    rank = settings.lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)
