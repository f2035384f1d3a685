"""How much memory there is, and whether a model fits in it."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

from excise.models.headers import Checkpoint

# Of the memory that is free; the rest is for activations, candidates' streams and the vocabulary's logits.
WEIGHTS_SHARE = 0.6
CGROUP = Path("/sys/fs/cgroup")
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be taken: of the GPUs together, or of this process's share of the machine's memory."""
    if torch.device(device).type == "cuda":
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return max(0, min(psutil.virtual_memory().available, _left_in_cgroup(), _left_by_limit()))


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights when loaded: plain ones in a dtype, quantised ones as they are stored."""
    return sum(
        tensor.bytes // ITEM_BYTES[tensor.dtype] * dtype.itemsize if tensor.dtype in ITEM_BYTES else tensor.bytes
        for tensor in checkpoint.tensors
    )


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a model can stay in memory and leave room to work in."""
    return weight_bytes(checkpoint, dtype) <= WEIGHTS_SHARE * free_memory(device)


def _left_in_cgroup() -> int:
    """What the container may still take (control groups, version 2)."""
    try:
        most, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return _unlimited()
    return _unlimited() if most == "max" else int(most) - int(used)


def _left_by_limit() -> int:
    """What a limit on the address space, such as a scheduler sets, leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return _unlimited() if soft == resource.RLIM_INFINITY else soft - psutil.Process().memory_info().vms


def _unlimited() -> int:
    return psutil.virtual_memory().total
