"""Short forms of numbers and index lists."""

from __future__ import annotations

from collections.abc import Sequence


def ranges(indices: Sequence[int]) -> str:
    """Indices as ranges.

    Examples:
        >>> ranges((3, 12, 13, 14, 26, 27))
        '3,12–14,26,27'

    """
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)


def human_bytes(count: int) -> str:
    """Bytes with a decimal unit.

    Examples:
        >>> human_bytes(14_155_776)
        '14.2 MB'

    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"
