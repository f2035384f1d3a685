"""Where a pruned checkpoint may be written."""

from __future__ import annotations

from pathlib import Path

from excise.errors import OutputError

RECIPE = "excise.json"


def check_destination(out: Path, source: str | Path | None, overwrite: bool) -> None:
    """Refuse to write over anything but a checkpoint that the user agreed to lose.

    Args:
        out: the folder to write.
        source: folder or file of the original, if it lies on this machine.
        overwrite: whether an existing checkpoint may be replaced.

    Raises:
        OutputError: `out` holds the original, is a file, is a folder with something else, or exists without leave.

    """
    if not out.exists():
        return
    if source and Path(source).exists() and Path(source).resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out} holds the original model; choose another place with --out")
    if not out.is_dir():
        raise OutputError(f"{out} is a file; expected a folder to write, choose another place with --out")
    if not any(out.iterdir()):
        return
    if not (out / "config.json").is_file():
        raise OutputError(
            f"{out} exists and is not a checkpoint (no config.json); it is not replaced, choose another --out"
        )
    if not overwrite:
        raise OutputError(f"{out} exists; choose another place with --out, or replace it with --force")
