"""Copying byte ranges from file to file, in the kernel where it can."""

from __future__ import annotations

import errno
import os
import sys

import numpy as np

from excise.errors import CheckpointError
from excise.models.headers import Slices

CHUNK = 64 * 2**20  # bytes a call: Ctrl-C is heard between calls
BUFFER = 8 * 2**20
NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def copy_range(source: int, target: int, start: int, count: int, name: str) -> None:
    """Append `count` bytes of one open file, from offset `start`, to another at its present position.

    Uses `copy_file_range`, which shares blocks on file systems that can; where the kernel or the two file systems do
    not offer it, `sendfile`; else a buffer.

    Args:
        source: file descriptor to read.
        target: file descriptor to write, unbuffered.
        start: offset of the first byte in `source`.
        count: bytes to copy.
        name: of the source, for the error.

    Raises:
        CheckpointError: the source ends before.
        OSError: reading or writing fails.

    """
    done = 0
    for way in _WAYS:
        try:
            while done < count:
                copied = way(source, target, start + done, min(CHUNK, count - done))
                if copied == 0:
                    break
                done += copied
            if done == count:
                return
        except OSError as error:
            if way is _WAYS[-1] or error.errno not in NOT_HERE:
                raise
    raise CheckpointError(f"{name} became shorter while it was read; is something else writing it?")


def copy_slices(source: int, target: int, start: int, slices: Slices, name: str) -> None:
    """Append a part of a tensor that lies at offset `start` of one open file to another.

    Args:
        source: file descriptor to read.
        target: file descriptor to write, unbuffered.
        start: offset of the tensor's first byte in `source`.
        slices: the part.
        name: of the source, for the error.

    Raises:
        CheckpointError: the source ends before.
        OSError: reading or writing fails.

    """
    if slices.outer == 1:
        for index in slices.kept:
            copy_range(source, target, start + index * slices.unit, slices.unit, name)
        return
    row = slices.total * slices.unit
    rows = max(1, BUFFER // max(1, row))
    for first in range(0, slices.outer, rows):
        count = min(rows, slices.outer - first)
        read = os.pread(source, count * row, start + first * row)
        if len(read) != count * row:
            raise CheckpointError(f"{name} became shorter while it was read; is something else writing it?")
        part = np.frombuffer(read, np.uint8).reshape(count, slices.total, slices.unit)[:, slices.kept]
        _write_all(target, part.tobytes())


def _write_all(target: int, data: bytes) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.write(target, view[done:])


def _by_copy_file_range(source: int, target: int, start: int, count: int) -> int:
    return os.copy_file_range(source, target, count, offset_src=start)


def _by_sendfile(source: int, target: int, start: int, count: int) -> int:
    return os.sendfile(target, source, start, count)


def _by_buffer(source: int, target: int, start: int, count: int) -> int:
    data = os.pread(source, min(count, BUFFER), start)
    _write_all(target, data)
    return len(data)


_WAYS = (_by_copy_file_range, _by_sendfile, _by_buffer) if sys.platform == "linux" else (_by_buffer,)
