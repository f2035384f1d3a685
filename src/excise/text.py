"""Short forms of numbers and index lists, and texts of others made safe for a medium."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What a terminal takes for a command or shows in another place: control characters but line ends and tabs, halves of
# surrogate pairs, and marks that turn the direction of writing.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What begins code, emphasis, HTML or a cell within a line of Markdown, or the address of a link; at its beginning, what
# makes the line a heading, a list or a rule.
MARKDOWN = re.compile(r"[\\`*<>|]|(?<=\])[(\[]|\A[#+=~-]")
# A path from the root or from someone's home, where a word or a part of one begins.
PLACE = re.compile(r"(?:(?<=[\s'\"=,:])|^)(?:~|/)[^\s'\",:]*/([^\s'\",:/]+)")
# What spreadsheets take for the beginning of a formula.
FORMULA = ("=", "+", "-", "@")


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


def printable(text: str) -> str:
    r"""Text from a file or a name, for a terminal: what would steer it is written as an escape.

    Examples:
        >>> print(printable("a\x1b[2J"))
        a\x1b[2J

    """
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """Text from a file or a name on one line, see `printable`."""
    return printable(" ".join(text.split()))


def without_places(text: str) -> str:
    """A command or a name without the folders of whoever gave it: of a path from the root, its last part.

    Examples:
        >>> without_places("excise run /home/me/llama --data a.jsonl:3,/data/b.txt:1 --out ~/runs/small")
        'excise run llama --data a.jsonl:3,b.txt:1 --out small'

    """
    return PLACE.sub(r"\1", text)


def markdown_text(text: str) -> str:
    r"""Text from a file or a name, for Markdown: one line that begins no heading, link, cell or HTML.

    Examples:
        >>> print(markdown_text("a_model\n# <b>"))
        a_model # \<b\>

    """
    return MARKDOWN.sub(r"\\\g<0>", one_line(text))


def spreadsheet_text(text: str) -> str:
    """Text from a file or a name, for a cell of CSV: what is no number and would be a formula gets an apostrophe.

    Examples:
        >>> spreadsheet_text("=HYPERLINK(1)"), spreadsheet_text("-0.5")
        ("'=HYPERLINK(1)", '-0.5')

    """
    text = one_line(text)
    if not text.startswith(FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
