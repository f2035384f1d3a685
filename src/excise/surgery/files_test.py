"""The first level of proof: what was written is read back, whole, in step with its config, every number finite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from excise.errors import ExciseError
from excise.models.headers import Tensor
from excise.surgery.on_disk import Source, plan_removal, read_source

NUMBERS = {"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
CHUNK = 1 << 24  # elements looked at together: 64 MB in float32


def wrong_files(out: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint; None where nothing is.

    Weights are read once, some at a time; packed ones, which are no numbers by themselves, count as they are.

    Args:
        out: a checkpoint folder or a `.gguf` file.

    """
    try:
        broken = list(_not_finite_gguf(out) if out.is_file() else _not_finite(_source(out)))
    except (ExciseError, OSError) as error:
        return f"its files do not read back ({error})"
    if not broken:
        return None
    more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    return f"{broken[0]}{more} holds values that are not finite (NaN or infinite)"


def _source(out: Path) -> Source:
    source = read_source(out)
    plan_removal(source, ())
    return source


def _not_finite(source: Source) -> Iterator[str]:
    shards: dict[Path, list[Tensor]] = {}
    for tensor in source.checkpoint.tensors:
        if tensor.dtype in NUMBERS and not _unread(source, tensor.name):
            shards.setdefault(tensor.shard, []).append(tensor)
    for shard, tensors in shards.items():
        with safe_open(shard, framework="pt") as file:
            yield from (tensor.name for tensor in tensors if not _is_finite(file.get_tensor(tensor.name)))


def _unread(source: Source, name: str) -> bool:
    """Whether no model gets this tensor: a mask with infinities is not a weight."""
    return source.names is not None and (source.names.is_dropped(name) or source.names.is_computed(name))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are; a sum is faster than looking at each, and only misjudges what overflows it."""
    for chunk in tensor.reshape(-1).split(CHUNK):
        wide = chunk if chunk.dtype == torch.float64 else chunk.float()
        if not wide.sum().isfinite() and not wide.isfinite().all():
            return False
    return True


def _not_finite_gguf(path: Path) -> Iterator[str]:
    from excise.surgery.gguf import open_gguf

    for tensor in open_gguf(path).tensors:
        if re.fullmatch(r"F(16|32|64)", tensor.tensor_type.name) and not np.isfinite(tensor.data).all():
            yield tensor.name
