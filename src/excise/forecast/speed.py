"""How fast this machine is, from a short measurement on a few blocks with random weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from excise.models.architectures import architecture_of
from excise.surgery.config import pruned_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Blocks that are timed: enough for the kinds of a hybrid's period to be among them.
TIMED = 4
SEQUENCES, TOKENS = 4, 128
REPETITIONS = 3
READ_BYTES = 1 << 28


@dataclass(frozen=True)
class Speed:
    """What the times of a forecast rest on.

    Attributes:
        forward: operations a second in blocks, forwards.
        backward: seconds of a pass for activation gradients, forwards and back, over those of a forward pass.
        head: operations a second in the head.
        read: bytes a second from the disk; infinite where all is cached.

    """

    forward: float
    backward: float
    head: float
    read: float


def measured_speed(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, file: Path | None) -> Speed:
    """Time a few blocks of a model, its head, and reading from one of its files; takes seconds.

    Args:
        config: of the model.
        dtype: of the computation.
        device: of the computation.
        file: one of its weights' files; None reads nothing, and takes reading to cost nothing.

    """
    text = config.get_text_config(decoder=True)
    record = architecture_of(config.model_type)
    few = pruned_config(config, record, range(min(TIMED, text.num_hidden_layers), text.num_hidden_layers))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(few, dtype=dtype).eval().requires_grad_(False)
    ids = torch.arange(SEQUENCES * TOKENS, device=device).reshape(SEQUENCES, TOKENS) % text.vocab_size
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    blocks = sum(p.numel() for p in model.get_submodule(record.stack).parameters())

    def forwards(backwards: bool = False) -> None:
        stream = embedding(ids).requires_grad_(backwards)
        hidden = model.base_model(inputs_embeds=stream, use_cache=False).last_hidden_state
        if backwards:
            hidden.float().sum().backward()

    states = torch.randn(ids.numel(), head.weight.shape[1], device=device, dtype=dtype)
    with torch.no_grad():
        through_blocks = _seconds(forwards, device)
        through_head = _seconds(lambda: head(states), device)
    back_too = _seconds(lambda: forwards(backwards=True), device)
    operations = 2.0 * ids.numel()
    return Speed(
        operations * blocks / through_blocks,
        back_too / through_blocks,
        operations * head.weight.numel() / through_head,
        float("inf") if file is None else _reading(file),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of a few times; what else runs on the machine only adds."""
    found = []
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def _reading(file: Path) -> float:
    """Bytes a second from a file, with the system's cache of it dropped where that can be asked for."""
    number = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, 0, READ_BYTES, os.POSIX_FADV_DONTNEED)
        started, read = time.perf_counter(), 0
        while read < READ_BYTES and (piece := os.read(number, 1 << 22)):
            read += len(piece)
        return read / max(1e-9, time.perf_counter() - started)
    finally:
        os.close(number)
