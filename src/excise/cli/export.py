"""`excise export`: an energy and its budget as a file for other people's solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import json_text, replacing
from excise.errors import InputError
from excise.plain import Facts
from excise.settings import Fixing, Printing, Replacing, check_fixed, option

if TYPE_CHECKING:
    from excise.ising.problem import Problem

FORMATS = ("qubo", "ising", "bqm", "lp")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Replacing, Printing, Fixing):
    """Settings of `excise export`."""

    energy: Path = option(
        ..., "A symmetric matrix (.npy), or J and h (.npz, .safetensors).", argument=True, reads="path"
    )
    out: Path = option(..., "File to write.", group="Output", writes="update")
    format: str = option(
        ...,
        "qubo (qbsolv text), ising (JSON), bqm (dimod's file) or lp (CPLEX LP, constraints kept as rows).",
        group="Output",
        choices=FORMATS,
    )
    remove: int = option(..., "Number M of units to remove.", group="What to remove", least=1)
    penalty: str = option("safe", "Of qubo, ising and bqm: safe (minimum proved feasible), soft (repair) or a number.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fixed(self.protect, self.force_blocks, self.remove)
        if self.penalty not in ("safe", "soft"):
            _number(self.penalty)
        if self.format == "lp" and self.penalty != "safe":
            raise InputError("an LP file keeps the budget as a row and has no penalty; leave out --penalty")


def export(settings: ExportSettings) -> None:
    """Write the problem of removing exactly M units as a QUBO, an Ising model, a dimod BQM or an LP file."""
    from excise.ising.energies import Energy
    from excise.ising.problem import Problem

    problem = Problem(Energy.load(settings.energy), settings.remove, settings.protect, settings.force_blocks)
    with replacing(settings.out, force=settings.force) as temporary:
        facts = _write(problem, settings.format, settings.penalty, temporary)
    if settings.as_json:
        typer.echo(json_text({"out": settings.out, "format": settings.format, **facts}))
    elif facts["penalty"] is None:
        typer.echo(f"wrote {settings.out}: {facts['variables']} binaries, the budget as a row")
    else:
        typer.echo(f"wrote {settings.out}: {facts['variables']} variables, penalty {facts['penalty']:.6g}")


def _write(problem: Problem, file_format: str, penalty: str, out: Path) -> Facts:
    """Number of variables in the file, and its penalty; None where it has constraints instead."""
    if file_format == "lp":
        from excise.ising.bridges.lp import write_lp

        write_lp(problem, out)
        return {"variables": len(problem.energy), "penalty": None}
    from excise.ising.bridges.dimod import write_bqm
    from excise.ising.bridges.qubo import to_ising, to_qubo

    P = _penalty(problem, penalty)
    if file_format == "bqm":
        write_bqm(problem, out, P)
    else:
        (to_qubo if file_format == "qubo" else to_ising)(problem, P).save(out)
    return {"variables": len(problem.free), "penalty": P}


def _penalty(problem: Problem, text: str) -> float:
    from excise.ising.bridges.qubo import safe_penalty, soft_penalty

    if text in ("safe", "soft"):
        return safe_penalty(problem) if text == "safe" else soft_penalty(problem)
    return _number(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--penalty expects safe, soft or a number, got '{text}'")
    return number
