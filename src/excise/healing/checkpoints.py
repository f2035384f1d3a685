"""Checkpoints of a training: which of them are whole, and what is told where one cannot be written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback

from excise.artefacts import write_artefact
from excise.errors import HealingError, OutputError

MARK = "whole.json"


class Mark(TrainerCallback):
    """Marks a checkpoint as whole when every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the mark, last of all."""
        # Each process writes its random state by itself; the mark must come after the last of them.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_artefact(
                Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK, {"step": state.global_step}
            )


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(work: Path, *, clear: bool = False) -> Path | None:
    """The newest checkpoint that carries the mark; others are deleted where `clear` is set."""
    # By number: as text, 100 comes before 50.
    found = sorted(work.glob("checkpoint-*"), key=step_of)
    for path in found if clear else ():
        if not (path / MARK).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if (path / MARK).exists()), None)


@contextlib.contextmanager
def last_named(work: Path) -> Iterator[None]:
    """Turn what stops a training into an error that names the last whole checkpoint."""
    try:
        yield
    except HealingError as error:
        raise HealingError(
            f"{error}; {_where(work)}. Heal that one, or begin again, with a lower learning rate and another --out"
        ) from error
    except (OSError, SafetensorError, OutputError, RuntimeError) as error:
        # A full disk may come as a RuntimeError of torch's writer; all other RuntimeErrors are no matter of disks and
        # go on up.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise HealingError(
            f"a checkpoint could not be written ({error}); {_where(work)}. Free some space: the same command goes on"
        ) from error


def _where(work: Path) -> str:
    last = last_whole(work)
    return (
        "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}, a model like any other"
    )
