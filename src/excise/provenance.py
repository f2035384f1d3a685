"""Provenance: what is needed to say where a result came from and to make it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("excise", "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "accelerate", "datasets")
SAMPLED_ELEMENTS = 512


def provenance() -> dict[str, Any]:
    """Versions, machine, time and command of this process."""
    return {
        "command": " ".join(["excise", *map(shlex.quote, sys.argv[1:])]) if _is_command_line() else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": _machine(),
    }


def model_hash(model: Any) -> str:
    """SHA-256 fingerprint of a loaded model: its config, and each tensor's name, shape, dtype and sampled elements.

    It tells models, quantisations and prunings apart wherever they were loaded from, in seconds even for large ones;
    it is no proof against a deliberate forgery.
    """
    import torch

    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_sampled(tensor))
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    if tensor.is_meta or tensor.numel() == 0:
        return b"meta"
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED_ELEMENTS)
    return flat[::step].cpu().contiguous().float().numpy().tobytes()


def _is_command_line() -> bool:
    return Path(sys.argv[0]).name in ("excise", "__main__.py")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": platform.machine()}
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
