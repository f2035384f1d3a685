"""The metadata of a GGUF file, walked before a library reads it: what its counts and lengths claim lies in the file."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from excise.errors import CheckpointError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# Bytes of the other types of values, by their number in the format.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Of arrays in arrays; the format knows them, no writer makes any.
DEEPEST = 4


def require_sound_gguf(path: Path) -> None:
    """Refuse a GGUF file whose metadata claims more than the file holds: readers count to whatever it says.

    Args:
        path: the file; one that is no GGUF is left to its reader.

    Raises:
        CheckpointError: says where the claim stands.
        OSError: it cannot be read.

    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Files of machines of the other byte order have the small number of the version in its upper half.
            little = len(data) < 8 or struct.unpack_from("<I", data, 4)[0] & 0xFFFF
            walk = _Walk(data, path, "<" if little else ">")
            walk.skip(16)
            for _ in range(walk.number("Q")):
                walk.skip(walk.number("Q"))
                walk.value(walk.number("I"))


class _Walk:
    """A place in a file that moves on, and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path, order: str) -> None:
        self.data, self.path, self.order, self.at = data, path, order, 0

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: at byte {self.at:,} it claims {count:,} bytes, and "
                f"{max(0, len(self.data) - self.at):,} are left; download or copy it again"
            )
        self.at += count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(self.order + form))
        return int(struct.unpack_from(self.order + form, self.data, start)[0])

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in WIDTHS:
            self.skip(WIDTHS[kind])
        else:
            raise CheckpointError(
                f"{self.path} is damaged: at byte {self.at:,} it has a value of type {kind}, which GGUF does not know"
            )
