"""What a config claims against what lies beside it, before anything is allocated by its word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from excise.errors import CheckpointError, reading
from excise.models.headers import Checkpoint
from excise.models.names import names_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Integers that hold quantised weights pack at most so many of them into a byte (two bits each).
PACKED_PER_BYTE = 4
WIDE = ("F64", "F32", "F16", "BF16")
# A head or an embedding that is tied need not be in the file, and a model that is tiny has buffers of some size.
SLACK, SMALL = 2, 1_000_000
# Layers beyond those that names tell of; what else is wrong with their number is said where blocks are counted.
MORE_LAYERS = 64


def require_honest(config: PretrainedConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse a config whose model is far larger than its weights: transformers would build it, layer by layer.

    Args:
        config: as transformers reads it.
        checkpoint: headers of the weights.
        folder: for messages.

    Raises:
        CheckpointError: says what is claimed and what is there.
        InputError: no model can be made by this config.

    """
    held = sum(t.elements if t.dtype in WIDE else t.bytes * PACKED_PER_BYTE for t in checkpoint.tensors)
    _require_as_large(config, [tensor.name for tensor in checkpoint.tensors], held, folder / "config.json")


def require_honest_gguf(config: PretrainedConfig, path: Path) -> None:
    """Refuse a GGUF file whose metadata tell of a model far larger than its tensors, as `require_honest` does."""
    import gguf

    with reading(path, "a GGUF file"):
        tensors = gguf.GGUFReader(path).tensors
    _require_as_large(config, [tensor.name for tensor in tensors], sum(int(t.n_elements) for t in tensors), path)


def _require_as_large(config: PretrainedConfig, tensors: Sequence[str], held: int, place: Path) -> None:
    with reading(place, "a model's config"):
        layers = int(getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0)
        numbers = [int(part) for name in tensors for part in re.findall(r"\.(\d{1,9})\.", name)]
        named = max(numbers, default=0) + 1
    if layers > named + MORE_LAYERS:
        raise CheckpointError(
            f"{place} claims {layers:,} layers, and the weights have {named:,}; they do not belong together, or what "
            f"it says of the model is damaged"
        )
    with reading(place, "a model's config"):
        names = names_in(config)
    if names is not None and names.elements > SLACK * held + SMALL:
        raise CheckpointError(
            f"{place} describes a model of {names.elements:,} weights, and at most {held:,} are there; they do not "
            f"belong together, or what it says of the model is damaged"
        )
