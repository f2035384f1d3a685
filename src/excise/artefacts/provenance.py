"""Provenance: what is needed to say where a result came from and to make it again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from excise.plain import Facts

PACKAGES = ("excise", "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "accelerate", "datasets")


def provenance() -> Facts:
    """Versions, machine, time and command of this process."""
    return {
        "command": " ".join(["excise", *map(shlex.quote, sys.argv[1:])]) if _is_command_line() else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": _machine(),
    }


def _is_command_line() -> bool:
    return Path(sys.argv[0]).name in ("excise", "__main__.py")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Facts:
    facts: Facts = {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": platform.machine()}
    # Commands that need no torch must not load it to say so.
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
