"""`excise export`: an energy and its budget as a file for other people's solvers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from excise.cli.options import Force, ForceBlocks, Protect, check_new, indices
from excise.errors import InputError

if TYPE_CHECKING:
    from excise.ising.problem import Problem

FORMATS = ("qubo", "ising", "bqm", "lp")


def export(
    energy: Annotated[
        Path, typer.Argument(help="A symmetric matrix (.npy), or J and h (.npz, .safetensors).", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="qubo (qbsolv text), ising (JSON), bqm (dimod's file) or lp (CPLEX LP, constraints kept as rows).",
            show_default=False,
        ),
    ],
    remove: Annotated[int, typer.Option(help="Number M of units to remove.", show_default=False)],
    protect: Protect = "",
    force_blocks: ForceBlocks = "",
    penalty: Annotated[
        str, typer.Option(help="Of qubo, ising and bqm: safe (minimum proved feasible), soft (repair) or a number.")
    ] = "safe",
    force: Force = False,
) -> None:
    """Write the problem of removing exactly M units as a QUBO, an Ising model, a dimod BQM or an LP file."""
    if file_format not in FORMATS:
        raise InputError(f"expected --format in {', '.join(FORMATS)}, got '{file_format}'")
    if file_format == "lp" and penalty != "safe":
        raise InputError("an LP file keeps the budget as a row and has no penalty; leave out --penalty")
    check_new(out, force)

    from excise.ising.energies import Energy
    from excise.ising.problem import Problem

    problem = Problem(
        Energy.load(energy), remove, indices(protect, "--protect"), indices(force_blocks, "--force-blocks")
    )
    typer.echo(_write(problem, file_format, penalty, out))


def _write(problem: Problem, file_format: str, penalty: str, out: Path) -> str:
    if file_format == "lp":
        from excise.ising.bridges.lp import write_lp

        write_lp(problem, out)
        return f"wrote {out}: {len(problem.energy)} binaries, the budget as a row"
    from excise.ising.bridges.dimod import write_bqm
    from excise.ising.bridges.qubo import to_ising, to_qubo

    P = _penalty(problem, penalty)
    if file_format == "bqm":
        write_bqm(problem, out, P)
    else:
        (to_qubo if file_format == "qubo" else to_ising)(problem, P).save(out)
    return f"wrote {out}: {len(problem.free)} variables, penalty {P:.6g}"


def _penalty(problem: Problem, text: str) -> float:
    from excise.ising.bridges.qubo import safe_penalty, soft_penalty

    if text in ("safe", "soft"):
        return safe_penalty(problem) if text == "safe" else soft_penalty(problem)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--penalty expects safe, soft or a number, got '{text}'") from None
