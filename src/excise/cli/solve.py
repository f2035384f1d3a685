"""`excise solve`: the lowest states of an energy. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import json_text, replacing, write_artefact
from excise.errors import InputError, reading
from excise.job import made_by
from excise.plain import Facts
from excise.settings import (
    MILLISECONDS,
    Fixing,
    Goal,
    Porting,
    Printing,
    Replacing,
    Sampling,
    Weighing,
    amount,
    budgets,
    changed,
    check_fixed,
    names,
    names_in,
    option,
    require_one,
)

if TYPE_CHECKING:
    from excise.ising.energies import Energy
    from excise.ising.pattern import Pattern
    from excise.ising.problem import Constraint, Problem
    from excise.ising.spectrum import Spectrum
    from excise.ising.weighing import Weights

BRANCHING = "branch-and-bound"
OPEN = ".open.safetensors"
METRICS = ("hamming", "pearson")


@dataclass(frozen=True, kw_only=True)
class SolveSettings(Replacing, Weighing, Porting, Printing):
    """Settings of `excise solve`."""

    gradients: Path | None = option(None, "Gradients that `excise score` wrote.", argument=True, reads="path")
    hessian: Path | None = option(
        None, "Instead of gradients, any symmetric matrix (.npy), or J and h (.npz, .safetensors).", reads="path"
    )
    remove: tuple[int, ...] = option(
        (),
        "Number M of units to remove, or several: 3..27, or 4,8,12; or --remove-params, such as 25%.",
        group="What to remove",
        parse=budgets,
        shares="remove_params",
    )
    weights: Path | None = option(
        None, "With --hessian: one weight per unit (.npy), for …", group="What to remove", reads="path"
    )
    remove_weight: str = option(
        "", "… removing at least this weight, such as 25% or 7.5.", group="What to remove", parse=amount
    )
    energy: str = option(
        "fisher",
        "Energy built from gradients: fisher or fisher+linear.",
        choices=names_in("excise.ising.energies:ENERGIES"),
    )
    granularity: str = option(
        "block",
        "Units of the gradients: block, sublayer, attention, feed-forward or kind=moe, …",
        group="What to remove",
    )
    kinds: tuple[str, ...] = option(
        (), "Remove only units of these kinds, such as moe or attention.", group="What to remove", parse=names
    )
    at_most: tuple[str, ...] = option(
        (), "At most so many of a kind, such as attention=2,moe=3.", group="What to remove", parse=names
    )
    states: int = option(20, "Number K of lowest states.", least=1)
    solver: str = option(
        "auto",
        "auto, branch-and-bound, exhaustive, tabu, annealing, or a bridge (docs/bridges.md).",
        choices=names_in("excise.ising.solvers:SOLVERS", "auto"),
    )
    protect: tuple[int, ...] = changed(Fixing, "protect")
    force_blocks: tuple[int, ...] = changed(
        Fixing,
        "force_blocks",
        help="Units always removed; they count towards --remove.",
    )
    min_distance: int = option(1, "Smallest Hamming distance between states.", least=1)
    choose: int | None = option(None, "Keep this many of the K states, far apart by --by.", least=1)
    by: str = option("hamming", "hamming, or pearson (correlation of the masks).", choices=METRICS)
    touching: int | None = option(None, "Name the first state that removes this unit.")
    time_limit: float | None = option(None, "Seconds, after which the best known is returned.", above=0)
    continued: Path | None = option(
        None,
        "Go on from what a search of this problem left open: NAME.open.safetensors beside its NAME.json.",
        flag="--continue",
        reads="path",
    )
    seed: int = changed(Sampling, "seed", group="Options")
    out: Path | None = option(None, "File for the spectrum, or spectra (JSON).", group="Output", writes="file")
    figure: Path | None = option(
        None, "Several M: ground-state energy and its bound against M (SVG).", group="Output", writes="update"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.gradients is None) == (self.hessian is None):
            raise InputError("expected either a gradients file or --hessian FILE, got both or neither")
        require_one(self.remove, [goal.asked for goal in self.goals()])
        if self.timed and self.times is None:
            raise InputError(
                "--speedup and --remove-latency need measured times: run `excise times MODEL --out FILE`, and give "
                "--times FILE"
            )
        if self.timed and (self.granularity != "block" or self.gradients is None):
            raise InputError("times are those of whole blocks of a model; leave out --granularity and --hessian")
        if self.continued is not None and (
            len(self.remove) > 1 or self.min_distance > 1 or self.solver not in ("auto", BRANCHING)
        ):
            raise InputError(
                f"--continue takes one M, --min-distance 1 and the solver {BRANCHING}, whose search it goes on with"
            )
        if self.portable and (self.granularity != "block" or self.gradients is None):
            raise InputError(
                "--portable is a condition on whole blocks of a model; leave out --granularity and --hessian"
            )
        check_fixed(self.protect, self.force_blocks, min(self.remove, default=None))
        for text in self.at_most:
            _count(text)

    def goals(self) -> list[Goal]:
        """Amounts to remove, weights of one's own among them."""
        own = Goal(f"--remove-weight {self.remove_weight}", "weight", self.remove_weight)
        return [*super().goals(), *([own] if own.amount else [])]


@dataclass(frozen=True)
class _Units:
    """What may be removed: an energy, and what is known of each of its units."""

    energy: Energy
    kinds: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    sizes: Mapping[str, Sequence[float]] | None = None
    patterns: Mapping[str, Sequence[Sequence[bool]] | None] = field(default_factory=dict)
    model_hash: str = ""


def solve(settings: SolveSettings) -> None:
    """Find the lowest states of an energy that remove exactly M units, from gradients or from any matrix."""
    if settings.figure is not None:
        from excise.drawing.chart import require_svg

        require_svg(settings.figure)
    units = _units(settings)

    from excise.ising.problem import Problem
    from excise.ising.solvers import chosen, solve_all
    from excise.ising.solvers import solve as solve_problem
    from excise.ising.weighing import weight_budget

    protected = (*settings.protect, *_of_other_kinds(units, settings.kinds))
    constraints = _at_most(units, settings.at_most)
    for goal in settings.goals():
        constraints = (*constraints, *weight_budget(_weights_for(goal, units, settings), goal, protected))
    budget = settings.remove[0] if settings.remove else None
    pattern = _pattern(units, settings.portable)
    problem = Problem(units.energy, budget, protected, settings.force_blocks, constraints, pattern)
    options: Facts = {
        name: getattr(settings, name) for name in ("states", "solver", "seed", "time_limit", "min_distance")
    }
    if len(settings.remove) < 2:
        branching = chosen(problem, settings.solver).name == BRANCHING and settings.min_distance == 1
        proving = branching or settings.continued is not None
        spectrum = _proved(problem, settings) if proving else solve_problem(problem, **options)
        spectrum = replace(spectrum, labels=units.labels)
        if settings.choose is not None:
            kept = spectrum.select(settings.choose, by=settings.by)
            spectrum = replace(spectrum, states=kept, complete=False)
        _show(spectrum, problem, settings)
    else:
        spectra = solve_all(problem, settings.remove, **options)
        _show_all({m: replace(spectrum, labels=units.labels) for m, spectrum in spectra.items()}, settings)


def _proved(problem: Problem, settings: SolveSettings) -> Spectrum:
    """By branch-and-bound, from where another search ended; what this one leaves open is kept beside the spectrum."""
    from excise.ising.solvers.branch_and_bound import BranchAndBound
    from excise.ising.solvers.frontier import Frontier

    before = None if settings.continued is None else Frontier.load(settings.continued)
    spectrum, after = BranchAndBound().proceed(
        problem, settings.states, before, seed=settings.seed, time_limit=settings.time_limit
    )
    if settings.out is None:
        return spectrum
    place = settings.out.with_name(f"{settings.out.stem}{OPEN}")
    if after is None:
        place.unlink(missing_ok=True)
        return spectrum
    after.save(place)
    return replace(spectrum, notes=(*spectrum.notes, f"to go on with the proof: --continue {place}"))


def _units(settings: SolveSettings) -> _Units:
    from excise.ising.energies import ENERGIES, Energy
    from excise.ising.gradients import Gradients
    from excise.ising.units import units_of

    if settings.hessian is not None:
        energy = Energy.load(settings.hessian)
        sizes = None if settings.weights is None else {"weight": _weights(settings.weights, len(energy))}
        return _Units(energy, sizes=sizes)
    assert settings.gradients is not None  # one of the two was given
    measured = Gradients.load(settings.gradients)
    units = units_of(measured.gate_blocks, measured.gate_kinds, settings.granularity)
    labels = units.labels if settings.granularity != "block" else ()
    shown = ENERGIES[settings.energy](units.columns(measured.A), units.labels)
    origin = measured.provenance or {}
    patterns, model_hash = origin.get("patterns", {}), origin.get("model_hash", "")
    return _Units(shown, units.kinds, labels, units.sizes(measured), patterns, model_hash)


def _weights(path: Path, n: int) -> list[float]:
    import numpy as np

    with reading(path, f"the .npy file of {n} numbers that --weights expects"):
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    if values.shape != (n,):
        raise InputError(f"--weights expects {n} numbers, one per unit, got shape {values.shape}")
    return values.tolist()


def _of_other_kinds(units: _Units, kinds: Sequence[str]) -> list[int]:
    wanted = set(kinds)
    unknown = sorted(wanted - set(units.kinds))
    if unknown:
        raise InputError(f"--kinds {','.join(unknown)}: expected kinds in {_known_kinds(units)}")
    return [i for i, kind in enumerate(units.kinds) if kind not in wanted] if wanted else []


def _known_kinds(units: _Units) -> str:
    return ", ".join(sorted(set(units.kinds))) or "none: a plain matrix has no kinds, use --protect"


def _at_most(units: _Units, counts: Sequence[str]) -> tuple[Constraint, ...]:
    from excise.ising.problem import at_most

    constraints = []
    for text in counts:
        kind, count = _count(text)
        if kind not in units.kinds:
            raise InputError(f"--at-most expects kinds in {_known_kinds(units)}, got '{text}'")
        members = [i for i, other in enumerate(units.kinds) if other == kind]
        constraints.append(at_most(members, count, len(units.energy), name=f"at most {count} of kind {kind}"))
    return tuple(constraints)


def _count(text: str) -> tuple[str, int]:
    kind, _, count = text.partition("=")
    if not (kind and count.isdecimal()):
        raise InputError(f"--at-most expects KIND=COUNT such as attention=2, got '{text}'")
    return kind, int(count)


def _pattern(units: _Units, readers: Sequence[str]) -> Pattern | None:
    from excise.ising.pattern import Pattern
    from excise.models.architectures.readers import READERS
    from excise.models.portable import combined

    found = []
    for reader in readers:
        if reader not in units.patterns:
            raise InputError(
                f"these gradients do not say what {READERS[reader].title} takes from the index of a block: it does not "
                f"know this model, or they are older than --portable. Leave {reader} out, or score the model again"
            )
        if (allowed := units.patterns[reader]) is not None:
            found.append(Pattern(tuple(map(tuple, allowed)), name=f"the pattern of {READERS[reader].title}"))
    return combined(found)


def _weights_for(goal: Goal, units: _Units, settings: SolveSettings) -> Weights:
    from excise.ising.weighing import Weights

    if goal.measure == MILLISECONDS:
        from excise.ising.times import Times

        assert settings.times is not None  # the settings see to it
        return Times.load(settings.times).of_model(units.model_hash).weights(settings.latency_of)
    sizes = (units.sizes or {}).get(goal.measure)
    if sizes is None:
        known = "use --weights FILE with --remove-weight" if units.kinds == () else "score the model again"
        raise InputError(f"nothing is known of the {goal.measure} of the units; {known}")
    return Weights.of(sizes)


def _show(spectrum: Spectrum, problem: Problem, settings: SolveSettings) -> None:
    touching = settings.touching
    if settings.out is not None:
        spectrum.save(settings.out, key=made_by(settings))
    first = spectrum.first_touching(touching % spectrum.units) if touching is not None else None
    if settings.as_json:
        found = {} if touching is None else {"first_touching": first and spectrum.states.index(first)}
        typer.echo(json_text(spectrum.to_json() | found))
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


def _show_all(spectra: Mapping[int, Spectrum], settings: SolveSettings) -> None:
    values = {"spectra": [spectrum.to_json() for spectrum in spectra.values()]}
    if settings.out is not None:
        write_artefact(settings.out, values, key=made_by(settings))
    if settings.figure is not None:
        from excise.drawing.chart import write_chart
        from excise.report.spectra import budget_chart

        with replacing(settings.figure, force=settings.force) as temporary:
            write_chart(budget_chart(spectra), temporary)
    if settings.as_json:
        typer.echo(json_text(values))
        return
    from excise.cli.terminal import output
    from excise.report.spectra import budgets_table

    output.print(budgets_table(spectra))
