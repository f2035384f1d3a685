"""`excise solve`: the lowest states of an energy. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excise.cli.options import AsJson, Portable, Protect, Seed, budgets, check_new, indices
from excise.errors import InputError

if TYPE_CHECKING:
    from excise.ising.energies import Energy
    from excise.ising.pattern import Pattern
    from excise.ising.problem import Constraint, Problem
    from excise.ising.spectrum import Spectrum


@dataclass(frozen=True)
class _Units:
    """What may be removed: an energy, and what is known of each of its units."""

    energy: Energy
    kinds: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    sizes: Mapping[str, Sequence[float]] | None = None
    patterns: Mapping[str, Sequence[Sequence[bool]] | None] | None = None


def solve(
    gradients: Annotated[
        Path | None, typer.Argument(help="Gradients that `excise score` wrote.", show_default=False)
    ] = None,
    hessian: Annotated[
        Path | None,
        typer.Option(help="Instead of gradients, any symmetric matrix (.npy), or J and h (.npz, .safetensors)."),
    ] = None,
    remove: Annotated[
        str, typer.Option(help="Number M of units to remove, or several: 3..27, or 4,8,12.", show_default=False)
    ] = "",
    remove_params: Annotated[
        str,
        typer.Option(help="Instead of M: at least these parameters, such as 25% or 30000000, and at most a unit more."),
    ] = "",
    remove_bytes: Annotated[str, typer.Option(help="Likewise in bytes.")] = "",
    weights: Annotated[Path | None, typer.Option(help="With --hessian: one weight a unit (.npy), for …")] = None,
    remove_weight: Annotated[str, typer.Option(help="… removing at least this weight, such as 25% or 7.5.")] = "",
    energy: Annotated[str, typer.Option(help="Energy built from gradients: fisher or fisher+linear.")] = "fisher",
    granularity: Annotated[
        str, typer.Option(help="Units of the gradients: block, sublayer, attention, feed-forward or kind=moe, …")
    ] = "block",
    kinds: Annotated[str, typer.Option(help="Remove only units of these kinds, such as moe or attention.")] = "",
    at_most: Annotated[str, typer.Option(help="At most so many of a kind, such as attention=2,moe=3.")] = "",
    portable: Portable = "",
    states: Annotated[int, typer.Option(min=1, help="Number K of lowest states.")] = 20,
    solver: Annotated[
        str, typer.Option(help="auto, branch-and-bound, exhaustive, tabu, annealing, or a bridge (docs/bridges.md).")
    ] = "auto",
    protect: Protect = "",
    force_blocks: Annotated[
        str, typer.Option("--force-blocks", "--force", help="Units always removed; they count towards --remove.")
    ] = "",
    min_distance: Annotated[int, typer.Option(min=1, help="Smallest Hamming distance between states.")] = 1,
    choose: Annotated[
        int | None, typer.Option(min=1, help="Keep this many of the K states, far apart by --by.")
    ] = None,
    by: Annotated[str, typer.Option(help="hamming, or pearson (correlation of the masks).")] = "hamming",
    touching: Annotated[int | None, typer.Option(help="Name the first state that removes this unit.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds, after which the best known is returned.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="File for the spectrum, or spectra (JSON).")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Several M: ground-state energy and its bound against M (SVG).")
    ] = None,
    as_json: AsJson = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Find the lowest states of an energy that remove exactly M units, from gradients or from any matrix."""
    for path in (out, figure):
        if path is not None:
            check_new(path, overwrite)
    if figure is not None:
        from excise.drawing.chart import require_svg

        require_svg(figure)
    units = _units(gradients, hessian, weights, energy, granularity)
    goals = {"parameters": remove_params, "bytes": remove_bytes, "weight": remove_weight}
    asked = [name for name, goal in goals.items() if goal]
    if bool(remove) + len(asked) != 1:
        raise InputError("expected one of --remove, --remove-params, --remove-bytes and --remove-weight")
    constraints = _at_most(units, at_most)
    if asked:
        constraints = (*constraints, *_weight_budget(units, asked[0], goals[asked[0]]))

    from excise.ising.problem import Problem
    from excise.ising.solvers import solve as solve_problem
    from excise.ising.solvers import solve_all

    protected = (*indices(protect, "--protect"), *_of_other_kinds(units, kinds))
    wanted: list[int | None] = [*budgets(remove)] if remove else [None]
    forced = indices(force_blocks, "--force-blocks")
    pattern = _pattern(units, portable, granularity)
    problem = Problem(units.energy, wanted[0], protected, forced, constraints, pattern)
    options: dict[str, Any] = {"states": states, "solver": solver, "seed": seed}
    options |= {"time_limit": time_limit, "min_distance": min_distance}
    if len(wanted) == 1:
        spectrum = replace(solve_problem(problem, **options), labels=units.labels)
        if choose is not None:
            spectrum = replace(spectrum, states=spectrum.select(choose, by=by), complete=False)
        _show(spectrum, problem, touching, out, as_json)
    else:
        spectra = solve_all(problem, [m for m in wanted if m is not None], **options)
        spectra = {m: replace(spectrum, labels=units.labels) for m, spectrum in spectra.items()}
        _show_all(spectra, out, figure, as_json)


def _units(gradients: Path | None, hessian: Path | None, weights: Path | None, name: str, granularity: str) -> _Units:
    from excise.ising.energies import ENERGIES, Energy

    if (gradients is None) == (hessian is None):
        raise InputError("expected either a gradients file or --hessian FILE, got both or neither")
    if hessian is not None:
        energy = Energy.load(hessian)
        sizes = None if weights is None else {"weight": _weights(weights, len(energy))}
        return _Units(energy, sizes=sizes)
    if name not in ENERGIES:
        raise InputError(f"expected --energy in {', '.join(ENERGIES)}, got '{name}'")
    from excise.ising.gradients import Gradients
    from excise.ising.units import units_of

    assert gradients is not None
    measured = Gradients.load(gradients)
    units = units_of(measured.gate_blocks, measured.gate_kinds, granularity)
    labels = units.labels if granularity != "block" else ()
    patterns = (measured.provenance or {}).get("patterns")
    energy = ENERGIES[name](units.columns(measured.A), units.labels)
    return _Units(energy, units.kinds, labels, units.sizes(measured), patterns)


def _weights(path: Path, n: int) -> list[float]:
    import numpy as np

    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--weights expects a .npy file of {n} numbers, got {path} ({error})") from None
    if values.shape != (n,):
        raise InputError(f"--weights expects {n} numbers, one a unit, got shape {values.shape}")
    return values.tolist()


def _of_other_kinds(units: _Units, kinds: str) -> list[int]:
    wanted = {kind.strip() for kind in kinds.split(",") if kind.strip()}
    unknown = sorted(wanted - set(units.kinds))
    if unknown:
        raise InputError(f"--kinds {','.join(unknown)}: expected kinds in {_known_kinds(units)}")
    return [i for i, kind in enumerate(units.kinds) if kind not in wanted] if wanted else []


def _known_kinds(units: _Units) -> str:
    return ", ".join(sorted(set(units.kinds))) or "none: a plain matrix has no kinds, use --protect"


def _at_most(units: _Units, text: str) -> tuple[Constraint, ...]:
    from excise.ising.problem import at_most

    constraints = []
    for part in filter(None, text.split(",")):
        kind, equals, count = part.strip().partition("=")
        if not equals or not count.isdigit() or kind not in units.kinds:
            raise InputError(f"--at-most expects KIND=COUNT with kinds in {_known_kinds(units)}, got '{part}'")
        members = [i for i, other in enumerate(units.kinds) if other == kind]
        constraints.append(at_most(members, int(count), len(units.energy), name=f"at most {count} of kind {kind}"))
    return tuple(constraints)


def _pattern(units: _Units, portable: str, granularity: str) -> Pattern | None:
    from excise.ising.pattern import Pattern
    from excise.models.architectures.readers import READERS
    from excise.models.portable import combined, readers_named

    readers = readers_named(portable)
    if not readers:
        return None
    if granularity != "block" or units.patterns is None:
        raise InputError(
            "--portable needs gradients in which `excise score` noted what readers take from the index of a block, and "
            "blocks as units; score the model again, and leave out --granularity"
        )
    unknown = [reader for reader in readers if reader not in units.patterns]
    if unknown:
        raise InputError(f"{READERS[unknown[0]].title} does not know this model; leave {unknown[0]} out of --portable")
    found = {reader: allowed for reader in readers if (allowed := units.patterns[reader]) is not None}
    return combined(
        Pattern(tuple(map(tuple, allowed)), name=f"the pattern of {READERS[reader].title}")
        for reader, allowed in found.items()
    )


def _weight_budget(units: _Units, what: str, text: str) -> tuple[Constraint, ...]:
    """At least the target, at most the heaviest unit beyond it: an energy may fall as more is removed."""
    from excise.ising.problem import weigh_at_least, weigh_at_most

    sizes = (units.sizes or {}).get(what)
    if sizes is None:
        known = "use --weights FILE with --remove-weight" if units.kinds == () else "score the model again"
        raise InputError(f"nothing is known of the {what} of the units; {known}")
    try:
        target = float(text.removesuffix("%")) / 100 * sum(sizes) if text.endswith("%") else float(text)
    except ValueError:
        raise InputError(f"expected a share such as 25% or a number of {what}, got '{text}'") from None
    name = f"{text} of {sum(sizes):,} {what} in all units"
    return (
        weigh_at_least(sizes, target, name=f"remove at least {name}"),
        weigh_at_most(sizes, target + max(sizes), name=f"remove at most {name} and one unit more"),
    )


def _show(spectrum: Spectrum, problem: Problem, touching: int | None, out: Path | None, as_json: bool) -> None:
    if out is not None:
        spectrum.save(out)
    first = spectrum.first_touching(touching % spectrum.units) if touching is not None else None
    if as_json:
        found = {} if touching is None else {"first_touching": first and spectrum.states.index(first)}
        typer.echo(json.dumps(spectrum.to_json() | found))
        return
    from excise.cli.terminal import output
    from excise.report.spectra import frequency_line, spectrum_table

    output.print(spectrum_table(spectrum, problem.energy))
    output.print(frequency_line(spectrum, problem.energy))
    if touching is not None:
        place = f"state {spectrum.states.index(first)}" if first else f"none of the {len(spectrum)} listed states"
        output.print(f"first to remove {problem.energy.labels[touching]}: {place}")
    for note in spectrum.notes:
        output.print(note)


def _show_all(spectra: Mapping[int, Spectrum], out: Path | None, figure: Path | None, as_json: bool) -> None:
    values = {"spectra": [spectrum.to_json() for spectrum in spectra.values()]}
    if out is not None:
        from excise.artefacts import write_json

        write_json(out, values)
    if figure is not None:
        from excise.drawing.chart import write_chart
        from excise.report.spectra import budget_chart

        write_chart(budget_chart(spectra), figure)
    if as_json:
        typer.echo(json.dumps(values))
        return
    from excise.cli.terminal import output
    from excise.report.spectra import budgets_table

    output.print(budgets_table(spectra))
