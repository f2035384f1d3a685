"""What will be refused when a checkpoint is written, known from headers before anything is measured or trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise.artefacts import require_free
from excise.models.portable import require_portable
from excise.surgery.checkpoint import require_plain
from excise.surgery.on_disk import plan_removal, read_source, require_space


def require_writable(
    source: str | Path | None,
    out: str | Path,
    removed: Sequence[int] = (),
    *,
    changes: Any = None,
    portable: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Refuse, in milliseconds, what writing would refuse after all the work.

    Args:
        source: the original's checkpoint folder, `Loaded.folder`; None where there is none (a GGUF file).
        out: folder to be written.
        removed: original indices; negative ones count from the top. Empty where they are not chosen yet: then only what
            holds for every removal is checked.
        changes: the model in memory, if its weights will be written as they are there: repaired, merged or trained.
        portable: names of readers (`excise.models.architectures.readers.READERS`) for which the result must be right.
        overwrite: whether an existing checkpoint may be replaced.

    Raises:
        InputError: no such checkpoint, or `removed` does not fit its stack.
        ArchitectureError: the model type is unknown, its blocks depend on their place in the stack, no config
            describes what is left, or one of the readers in `portable` would take a block for another kind.
        CheckpointError: config and weights are damaged, unsafe or out of step with each other; an adapter lies beside
            the weights; or what changed could not be stored, since the weights in memory are quantised.
        OutputError: the folder exists, is not a checkpoint, or is the original's own; the place cannot be written, or
            has not enough space.

    """
    out = Path(out).expanduser()
    require_free(out, folder=True, inputs=[] if source is None else [source], force=overwrite)
    if changes is not None:
        require_plain(changes)
    if source is None:
        return
    original = read_source(source)
    plan = plan_removal(original, removed)
    if removed:
        require_portable(original.architecture, original.config, plan.removed, portable, original.raw)
    if removed or changes is not None:
        require_space(out, plan.bytes)
