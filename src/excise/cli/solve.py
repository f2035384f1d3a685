"""`excise solve`: the lowest states of an energy. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from excise.cli.options import AsJson, ForceBlocks, Protect, Seed, check_new, indices
from excise.errors import InputError

if TYPE_CHECKING:
    from excise.energies import Energy


def solve(
    gradients: Annotated[
        Path | None, typer.Argument(help="Gradients that `excise score` wrote.", show_default=False)
    ] = None,
    hessian: Annotated[
        Path | None,
        typer.Option(help="Instead of gradients, any symmetric matrix (.npy), or J and h (.npz, .safetensors)."),
    ] = None,
    remove: Annotated[int, typer.Option(help="Number M of units to remove.", show_default=False)] = 0,
    energy: Annotated[str, typer.Option(help="Energy built from gradients: fisher or fisher+linear.")] = "fisher",
    states: Annotated[int, typer.Option(min=1, help="Number K of lowest states.")] = 20,
    solver: Annotated[str, typer.Option(help="auto, exhaustive or tabu.")] = "auto",
    protect: Protect = "",
    force_blocks: ForceBlocks = "",
    min_distance: Annotated[int, typer.Option(min=1, help="Smallest Hamming distance between states.")] = 1,
    time_limit: Annotated[float | None, typer.Option(help="Seconds, after which the best known is returned.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="File for the spectrum (JSON).")] = None,
    as_json: AsJson = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Find the lowest states of an energy that remove exactly M units, from gradients or from any matrix."""
    if out is not None:
        check_new(out, overwrite)
    chosen = _energy(gradients, hessian, energy)

    from excise.problem import Problem
    from excise.solvers import solve as solve_problem

    problem = Problem(chosen, remove, indices(protect, "--protect"), indices(force_blocks, "--force-blocks"))
    spectrum = solve_problem(
        problem, states=states, solver=solver, seed=seed, time_limit=time_limit, min_distance=min_distance
    )
    if out is not None:
        spectrum.save(out)
    if as_json:
        typer.echo(json.dumps(spectrum.to_json()))
        return
    from excise.cli.terminal import output
    from excise.report.tables import spectrum_table

    output.print(spectrum_table(spectrum, chosen))
    for note in spectrum.notes:
        output.print(note)


def _energy(gradients: Path | None, hessian: Path | None, name: str) -> Energy:
    from excise.energies import ENERGIES, Energy

    if (gradients is None) == (hessian is None):
        raise InputError("expected either a gradients file or --hessian FILE, got both or neither")
    if hessian is not None:
        return Energy.load(hessian)
    if name not in ENERGIES:
        raise InputError(f"expected --energy in {', '.join(ENERGIES)}, got '{name}'")
    from excise.gradients import Gradients

    assert gradients is not None
    return ENERGIES[name](Gradients.load(gradients).blocks())
