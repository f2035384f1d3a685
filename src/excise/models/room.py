"""How much memory there is, and whether a model fits in it."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

from excise.models.headers import Checkpoint
from excise.team import launched_here

# Of what work with a model takes; the rest is for activations, candidates' streams and the vocabulary's logits.
WEIGHTS_SHARE = 0.6
# Of what is free when a pass begins: for streams that wait between blocks, and for distributions others are compared
# with. The block in hand, logits, fits and the page cache want some too.
STREAMS_SHARE = DISTRIBUTIONS_SHARE = 0.25
# Files of control groups, versions 2 and 1: the limit, what is used, and the cached files among it.
CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), "memory.usage_in_bytes", "total_inactive_file"),
)
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be taken: of one GPU, of all ("cuda"), or of this process's share of the machine's."""
    place = torch.device(device)
    if place.type == "cuda":
        indices = range(torch.cuda.device_count()) if place.index is None else (place.index,)
        return sum(torch.cuda.mem_get_info(index)[0] for index in indices)
    # Processes of one job load the model at the same time, each its own.
    shared = min(psutil.virtual_memory().available, _left_in_cgroup()) // launched_here()
    return max(0, min(shared, _left_by_limit()))


def free_everywhere() -> int:
    """Bytes that can still be taken, of this process's share of the machine's memory and of all GPUs."""
    return free_memory() + free_memory("cuda")


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights when loaded: plain ones in a dtype, quantised ones as they are stored."""
    return sum(
        tensor.bytes // ITEM_BYTES[tensor.dtype] * dtype.itemsize if tensor.dtype in ITEM_BYTES else tensor.bytes
        for tensor in checkpoint.tensors
    )


def placement_for(resident: float, free: float) -> str:
    """Where a model goes under "auto": all in memory where that fits, else a block at a time.

    Args:
        resident: bytes that the job takes with all weights in memory.
        free: bytes that can be taken.

    """
    return "resident" if resident <= free else "streamed"


def needed(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """Bytes that work with a model in memory takes, about, where nothing is known of the work."""
    return weight_bytes(checkpoint, dtype) / WEIGHTS_SHARE


def _left_in_cgroup() -> int:
    """What the container may still take: its limit less what it holds, but for cached files, which give way."""
    left = _unlimited()
    for most, used, cached in CGROUP_FILES:
        for folder in _cgroup_folders(most.parent):
            try:
                limit = (folder / most.name).read_text().strip()
                inside = int((folder / used).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.isdigit():
                left = min(left, int(limit) - inside + int(statistics.get(cached, 0)))
    return left


def _cgroup_folders(root: Path) -> list[Path]:
    """Where this process's control group lies, in a container and outside of one."""
    try:
        own = [line.split(":", 2)[2].lstrip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        own = []
    return [root, *(root / path for path in dict.fromkeys(own) if path)]


def _left_by_limit() -> int:
    """What a limit on the address space, such as a scheduler sets, leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return _unlimited() if soft == resource.RLIM_INFINITY else soft - psutil.Process().memory_info().vms


def _unlimited() -> int:
    return psutil.virtual_memory().total
