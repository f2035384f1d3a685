"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from excise.energies import Energy
from excise.models.stack import Stack
from excise.spectrum import Spectrum
from excise.verify import Candidate, Verified


def stack_table(stack: Stack, removable: Iterable[int]) -> Table:
    """The stack: index, kind, sublayers, parameters, bytes, whether removable."""
    table = Table("block", "kind", "sublayers", "parameters", "bytes", "removable")
    allowed = set(removable)
    for block in stack.blocks:
        sublayers = ", ".join(f"{s.kind} ({type(s.module).__name__})" for s in block.sublayers)
        table.add_row(
            str(block.index),
            type(block.module).__name__,
            sublayers,
            f"{block.parameters:,}",
            human_bytes(block.bytes),
            "yes" if block.index in allowed else "no",
        )
    return table


def candidates_table(verified: Verified, chosen: Candidate, total: int) -> Table:
    """Method, blocks removed, energy, Δ loss, perplexity, parameters left; the chosen row is marked."""
    table = Table("", "method", "blocks removed", "energy", "Δ loss (nats)", "perplexity", "parameters")
    for candidate in verified.candidates:
        is_chosen = candidate.removed == chosen.removed
        table.add_row(
            "→" if is_chosen else "",
            candidate.method,
            ranges(candidate.removed),
            f"{candidate.energy:.4g}",
            f"{candidate.delta:+.3f}",
            f"{candidate.perplexity:.4g}" if math.isfinite(candidate.perplexity) else "∞",
            f"{candidate.parameters / 1e6:,.1f} M ({candidate.parameters / total:.0%})",
            style="bold green" if is_chosen else None,
        )
    return table


def spectrum_table(spectrum: Spectrum, energy: Energy) -> Table:
    """The states of a spectrum, lowest first."""
    table = Table("state", "energy", "removed", title=certificate(spectrum))
    for k, state in enumerate(spectrum):
        names = [energy.labels[i] for i in state.removed]
        numbered = all(name == str(i) for i, name in zip(state.removed, names, strict=True))
        table.add_row(str(k), f"{state.energy:.6g}", ranges(state.removed) if numbered else ", ".join(names))
    return table


def certificate(spectrum: Spectrum) -> str:
    """One line on what was proved."""
    if spectrum.certified:
        return f"certified: the {len(spectrum)} lowest states ({spectrum.solver}, {spectrum.seconds:.2f} s)"
    if spectrum.gap is not None:
        return f"not certified: gap {spectrum.gap:.1%} ({spectrum.solver}, {spectrum.seconds:.2f} s)"
    return f"not certified: best states found by {spectrum.solver} ({spectrum.seconds:.2f} s)"


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
