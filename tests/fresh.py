"""What self-tests have a fresh process do, done in this one: importing transformers again takes seconds each time."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

from excise.errors import UntestableError
from excise.surgery.proof import Report


def in_this_process(script: Path, folder: Path, *arguments: str, timeout_s: float) -> Report:
    """Stand-in for `excise.surgery.self_test.in_fresh_process`, of the same result."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [str(script), str(folder.resolve()), *arguments]
    try:
        with redirect_stdout(said):
            runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        raise UntestableError(f"a fresh process of stock transformers ended with 1: {error!r}") from None
    finally:
        sys.argv = argv
    return json.loads(said.getvalue().strip().splitlines()[-1])
