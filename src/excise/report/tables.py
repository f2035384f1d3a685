"""Tables of models and of measured candidates for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rich.table import Table

from excise.choosing.verify import Candidate, Verified
from excise.forecast.stages import Forecast, Stage
from excise.ising.times import Times
from excise.models.stack import Stack
from excise.plain import Facts
from excise.text import human_bytes, ranges

TIMED = ("prefill", "decode", "request")


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


def forecast_table(found: Forecast) -> Table:
    """Stages of a job: memory at the peak, bytes read, time."""
    table = Table(found.placement, "memory", "read", "time")
    for stage in (*found.stages, Stage("whole job", found.memory, found.read, found.seconds)):
        time = "" if stage.seconds is None else f"{stage.seconds / 60:,.1f} min"
        table.add_row(stage.name, human_bytes(int(stage.memory)), human_bytes(int(stage.read)), time)
    return table


def times_table(times: Times) -> Table:
    """Of each kind of block, how many there are and what each takes; then what is left, and all together."""
    request = times.request
    title = f"{request.prompt_tokens} tokens read, {request.new_tokens} written, {request.batch} at once"
    table = Table("", "blocks", "prefill", "a token decoded", "request", title=title)
    rest = times.without(range(len(times.blocks)))
    each = {kind: times.blocks[times.kinds.index(kind)] for kind in dict.fromkeys(times.kinds)}
    rows = [(kind, str(times.kinds.count(kind)), latency) for kind, latency in each.items()]
    rows += [("everything else", "", rest), ("whole model", str(len(times.blocks)), times.whole)]
    for name, count, latency in rows:
        table.add_row(name, count, *(f"{1000 * latency.of(part, request.new_tokens):.4g} ms" for part in TIMED))
    return table


def speed_line(speed: Facts) -> str:
    """How many times as fast a result is, as predicted and as measured."""
    predicted, measured = speed["predicted"], speed["measured"]
    said = {part: f"{measured[part]:.2f}×" if measured else "not measured" for part in TIMED}
    parts = (f"{part} {said[part]} (predicted {predicted[part]:.2f}×)" for part in TIMED)
    return f"as fast as the original in {speed['engine']}: {', '.join(parts)}"


def worst_of(domains: Mapping[str, float | None]) -> str:
    """The domain of the largest damage, where there are several."""
    finite = {name: delta for name, delta in domains.items() if delta is not None and math.isfinite(delta)}
    if len(finite) < 2:
        return ""
    name = max(finite, key=finite.__getitem__)
    return f"{name} {finite[name]:+.2f}"


def candidates_table(verified: Verified, chosen: Candidate, total: int) -> Table:
    """Method, blocks removed, energy, Δ loss, worst domain, perplexity, parameters left; the chosen row is marked.

    Where some were repaired, Δ loss after repair stands beside that before.
    """
    is_repaired = any(candidate.repaired_loss is not None for candidate in verified.candidates)
    table = Table("", "method", "blocks removed", "energy", "Δ loss (nats)")
    if is_repaired:
        table.add_column("repaired")
    for name in ("worst domain", "perplexity", "parameters"):
        table.add_column(name)
    for candidate in verified.candidates:
        is_chosen = candidate.removed == chosen.removed
        after = candidate.repaired_loss
        table.add_row(
            "→" if is_chosen else "",
            candidate.method,
            ranges(candidate.removed),
            f"{candidate.energy:.4g}",
            f"{candidate.delta:+.3f}",
            *(["" if after is None else f"{after - verified.base_loss:+.3f}"] if is_repaired else []),
            worst_of(candidate.domains),
            f"{candidate.perplexity:.4g}" if math.isfinite(candidate.perplexity) else "∞",
            f"{candidate.parameters / 1e6:,.1f} M ({candidate.parameters / total:.0%})",
            style="bold green" if is_chosen else None,
        )
    return table
