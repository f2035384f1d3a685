"""Names that a file of others gives, and links in a folder of others: what they may lead to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from excise.errors import InputError
from excise.plain import Plain


def inside(folder: str | Path, name: Plain, said_by: str | Path) -> Path:
    """The file or folder, there or not, that an artefact names beside itself.

    Args:
        folder: of the artefact.
        name: as the artefact has it.
        said_by: the artefact, for the message.

    Raises:
        InputError: it is no plain relative name, or a link leads out of the folder: whoever wrote the artefact would
            choose what is read or written elsewhere.

    """
    plain = isinstance(name, str) and name not in ("", ".") and not set(name) & set("\\\0")
    if not plain or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InputError(f"{said_by} names {name!r}; expected a name inside {folder}")
    path = Path(folder) / name
    if not stays_inside(path, Path(folder)):
        raise InputError(f"{said_by} names {name!r}, which is a link that leads out of {folder}")
    return path


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies in a folder, or is a blob of the hub's repository that the folder is of."""
    try:
        target, root = path.resolve(), folder.resolve()
    # A circle of links.
    except (OSError, RuntimeError):
        return False
    if target.is_relative_to(root):
        return True
    repository = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return is_snapshot and target.is_relative_to(repository / "blobs")
