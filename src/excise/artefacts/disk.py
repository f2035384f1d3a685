"""What a disk that takes no more says, in the words of those who write to it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from excise.errors import OutputError
from excise.text import human_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
# safetensors hands on the system's words, PyTorch's archives only that their own end is not where it should be.
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter", "inline_container")


def disk_error(error: BaseException, place: str | Path) -> OutputError | None:
    """What an error says of the disk, as one of ours; None where it says nothing of it.

    Args:
        error: whatever was raised, by whomever.
        place: what was being written.

    """
    if _is_full(error):
        return OutputError(f"no space left to write {place} ({_free(Path(place))}); free some and run again")
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return OutputError(f"{place} is larger than files may be there; choose another place with --out")
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
        return OutputError(f"cannot write {place}: {error.strerror}; choose another place with --out")
    return None


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_IN_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(place: Path) -> str:
    existing = next((folder for folder in (place, *place.absolute().parents) if folder.exists()), None)
    return "unknown how much is free" if existing is None else f"{human_bytes(shutil.disk_usage(existing).free)} free"
