"""What a folder holds for tables and the page: every artefact excise writes, read from the folder and those in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from excise.artefacts import as_number, read_json
from excise.errors import InputError, reading
from excise.evaluation.scores import Scores
from excise.ising.energies import ENERGIES, Energy
from excise.ising.gradients import Gradients
from excise.ising.spectrum import Spectrum
from excise.plain import Plain, Values
from excise.report.schema import check
from excise.report.words import short_source

Removed = tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """A removal and its damage on held-out samples.

    Attributes:
        removed: sorted original indices.
        methods: who proposed it.
        energy: under the run's energy; None where it is not known.
        delta: loss less that of the intact model, nats per token.
        perplexity: exp(loss); infinite where the model overflowed.
        repaired: as `delta`, after closed-form repair; None where it was not repaired.

    """

    removed: Removed
    methods: tuple[str, ...]
    energy: float | None
    delta: float
    perplexity: float
    repaired: float | None = None

    @property
    def written(self) -> float:
        """Damage as it would be written: repaired where that lowers it."""
        return self.delta if self.repaired is None else min(self.delta, self.repaired)


@dataclass(frozen=True)
class Material:
    """Everything that was found, over blocks.

    Attributes:
        folder: where it was looked for.
        runs: contents of run.json, by budget.
        places: the folder of each of `runs`.
        spectra: by name of the energy and budget.
        measured: by budget, lowest damage first, after repair where there was one; every removal once. Of runs and
            `excise verify`, and of a comparison at budgets where they have none: its held-out text may be another.
        energies: by name.
        kinds: kind of each block; empty where it is not known.
        sizes: parameters of each block; empty where they are not known.
        compare: contents of compare.json.
        scores: all scores.
        panel: contents of panel.json.
        refined: what `excise refine` found, by budget.
        healing: contents of heal.json, by the name of its folder.
        left_out: files that were found and not used, with the reason.

    """

    folder: Path
    runs: tuple[Values, ...] = ()
    places: tuple[Path, ...] = ()
    spectra: Mapping[str, Mapping[int, Spectrum]] = field(default_factory=dict)
    measured: Mapping[int, tuple[Measured, ...]] = field(default_factory=dict)
    energies: Mapping[str, Energy] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    compare: Values = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)
    panel: Values = field(default_factory=dict)
    refined: Mapping[int, Values] = field(default_factory=dict)
    healing: Mapping[str, Values] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def run(self) -> Values:
        """The run that the page opens with: the folder's own, else the first; empty where there is none."""
        own = [run for run, place in zip(self.runs, self.places, strict=True) if place == self.folder]
        return (own or list(self.runs) or [{}])[0]

    @property
    def blocks(self) -> int:
        """Number of blocks of the original; 0 where nothing says it."""
        spectra = [s for by_budget in self.spectra.values() for s in by_budget.values()]
        known = [self.run.get("blocks"), self.compare.get("blocks"), *(s.units for s in spectra)]
        return next((int(n) for n in known if n), 0)

    @property
    def model(self) -> str:
        """What the model was called, without the folders of whoever ran it."""
        source = str(self.run.get("model") or self.compare.get("model") or "")
        if not source:
            original = next((m for m in self.scores.models.values() if not m.removed), None)
            return original.name if original else self.folder.resolve().name
        return short_source(source)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Every M that anything is known of."""
        found = {m for by_budget in self.spectra.values() for m in by_budget} | set(self.measured)
        return tuple(sorted(found))


def gather(folder: str | Path) -> Material:
    """Read a folder and the folders in it: run.json, spectra, gradients, verified, compare, scores, heal.

    Raises:
        InputError: no such folder, nothing of excise in it, or runs of different models.

    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; expected one that `excise run` wrote")
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))]
    return _gathered(folder, places, {path: read_json(path) for path in _json_files(places)})


def gather_run(folder: Path, run: Values) -> Material:
    """Read what a run wrote before its run.json, and nothing of other runs beneath its folder.

    Args:
        folder: of the run.
        run: what its run.json will hold.

    Raises:
        InputError: a file in the folder is not what its name says.

    """
    places = [folder, *(healed for healed in [folder / "healed"] if healed.is_dir())]
    files = {path: read_json(path) for path in _json_files(places)}
    return _gathered(folder, places, {**files, folder / "run.json": run})


def _json_files(places: Sequence[Path]) -> list[Path]:
    return [path for place in places for path in sorted(place.glob("*.json"))]


def _gathered(folder: Path, places: Sequence[Path], files: Mapping[Path, Any]) -> Material:
    known: dict[str, list[tuple[Path, Any]]] = {}
    for path, content in files.items():
        if kind := _kind(path, content):
            check(kind, content, path)
            known.setdefault(kind, []).append((path, content))
    gradients = next((p / "gradients.safetensors" for p in places if (p / "gradients.safetensors").is_file()), None)
    if not known and gradients is None:
        raise InputError(
            f"{folder} holds nothing to report on; expected run.json, spectra, compare.json or scores.json, "
            f"there or in its folders"
        )
    runs = sorted(known.get("run", []), key=lambda found: (found[1]["budget"], str(found[0])))
    _require_one_model([run for _, run in runs])
    units = next((run["blocks"] for _, run in runs), None)
    spectra, left_out = _spectra(known.get("spectrum", []), units)
    energies, kinds, sizes = _from_gradients(gradients)
    energies |= _saved_energies(places, units)
    refined = {int(m): facts for _, content in known.get("candidates", []) for m, facts in content["budgets"].items()}
    scores = Scores()
    for path, _ in known.get("scores", []):
        loaded = Scores.load(path)
        scores = replace(scores, provenance=loaded.provenance)
        for result in loaded.results:
            scores = scores.adding(loaded.models[result.model], result)
    compare: Values = next((content for _, content in known.get("compare", [])), {})
    compared = [row for row in compare.get("rows", ()) if len(row["removed"]) == row["remove"] and not row.get("merge")]
    candidates = [row for kind in ("run", "verified") for _, c in known.get(kind, []) for row in c["candidates"]]
    return Material(
        folder=folder,
        runs=tuple(run for _, run in runs),
        places=tuple(path.parent for path, _ in runs),
        spectra=spectra,
        measured=measured_removals(compared) | measured_removals(candidates),
        energies=energies,
        kinds=kinds,
        sizes=sizes,
        compare=compare,
        scores=scores,
        panel=next((content for _, content in known.get("panel", [])), {}),
        refined=dict(sorted(refined.items())),
        healing={path.resolve().parent.name: content for path, content in known.get("heal", [])},
        left_out=tuple(left_out),
    )


def _kind(path: Path, content: Plain) -> str | None:
    """What a JSON file is, by its content where its name may be anything."""
    if not isinstance(content, dict):
        return None
    if path.name in ("run.json", "compare.json", "heal.json", "panel.json"):
        return path.stem
    if str(content.get("format", "")).startswith("excise scores"):
        return "scores"
    if path.name == "candidates.json":
        return path.stem if "budgets" in content else None
    if "spectra" in content or {"states", "solver", "units"} <= content.keys():
        return "spectrum"
    return "verified" if {"candidates", "base_loss"} <= content.keys() else None


def _require_one_model(runs: Sequence[Values]) -> None:
    names = sorted({run["model"] for run in runs})
    if len({run["model_hash"] for run in runs}) > 1:
        raise InputError(f"the folder holds runs of different models ({', '.join(names)}); report on one at a time")


def _spectra(files: Sequence[tuple[Path, Any]], units: int | None) -> tuple[dict[str, dict[int, Spectrum]], list[str]]:
    spectra: dict[str, dict[int, Spectrum]] = {}
    left_out = []
    for path, content in files:
        name = path.stem.removeprefix("spectrum").removeprefix("spectra").lstrip("-_") or "energy"
        for value in content.get("spectra", [content]):
            with reading(path, "a spectrum"):
                spectrum = Spectrum.from_json(value)
            units = units or spectrum.units
            energy = name.removesuffix(f"-{spectrum.budget}")
            if spectrum.units != units:
                left_out.append(f"{path.name}: {spectrum.units} units, where the model has {units} blocks")
                continue
            for budget, at_budget in spectrum.by_budget().items():
                known = spectra.setdefault(energy, {}).get(budget)
                if known is None or len(known) < len(at_budget):
                    spectra[energy][budget] = at_budget
    return {name: dict(sorted(found.items())) for name, found in sorted(spectra.items()) if found}, left_out


def _from_gradients(path: Path | None) -> tuple[dict[str, Energy], tuple[str, ...], tuple[int, ...]]:
    if path is None:
        return {}, (), ()
    gradients = Gradients.load(path)
    columns = gradients.blocks()
    sizes = gradients.sizes.get("blocks", {}).get("parameters", ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples: said when they were scored
        energies = {name: build(columns) for name, build in ENERGIES.items()}
    return energies, gradients.block_kinds(), tuple(int(size) for size in sizes)


def _saved_energies(places: Sequence[Path], units: int | None) -> dict[str, Energy]:
    """Energies that no function of the gradients gives: `energy-NAME.safetensors`, NAME being refinement's budget."""
    found = {}
    for path in (path for place in places for path in sorted(place.glob("energy-*.safetensors"))):
        name, energy = path.stem.removeprefix("energy-"), Energy.load(path)
        if units in (None, len(energy)):
            found[f"fitted-{name}" if name.isdigit() else name] = energy
    return found


def measured_removals(candidates: Sequence[Values]) -> dict[int, tuple[Measured, ...]]:
    """Distinct removals by budget, lowest damage first, repaired where that was tried.

    Args:
        candidates: with `method`, `removed`, `delta`, `perplexity`, maybe `energy`, maybe `loss` and `repaired_loss`;
            several may name one removal.

    """
    found: dict[Removed, Measured] = {}
    for candidate in candidates:
        removed = tuple(candidate["removed"])
        before = found.get(removed)
        methods = (*(before.methods if before else ()), str(candidate["method"]))
        found[removed] = Measured(
            removed,
            tuple(dict.fromkeys(methods)),
            candidate.get("energy") if before is None else before.energy,
            as_number(candidate["delta"]) if before is None else before.delta,
            as_number(candidate["perplexity"]) if before is None else before.perplexity,
            _after_repair(candidate) if before is None else before.repaired,
        )
    budgets = sorted({len(removed) for removed in found})
    return {
        m: tuple(
            sorted((f for r, f in found.items() if len(r) == m), key=lambda f: (f.written != f.written, f.written))
        )
        for m in budgets
    }


def _after_repair(candidate: Values) -> float | None:
    """Damage after repair; the loss of the intact model is what candidates know of it."""
    repaired = candidate.get("repaired_loss")
    return None if repaired is None else repaired - candidate["loss"] + as_number(candidate["delta"])
