"""Every criterion on one model: same calibration, same held-out text, same cost accounting."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from excise.artefacts import read_json, write_json
from excise.choosing.criteria import CRITERIA, EXPENSIVE, RANDOM, SEARCHING, SUBLAYER_CRITERIA, Selection
from excise.choosing.criteria.ground_states import shared_gradients
from excise.choosing.criteria.selection import Spent, at_smaller_budget
from excise.choosing.intervals import Choice, Floats, Judge, Row
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.ising.energies import ENERGIES
from excise.measuring.measure import measure
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.models.stack import Stack
from excise.progress import Progress, silent
from excise.provenance import provenance
from excise.repair.repair_stage import repair_removals
from excise.surgery.merge import merging

MANIFEST = "compare.json"
WORK = "work"
ALL = "all"


@dataclass(frozen=True)
class Comparison:
    """All methods at all budgets.

    Attributes:
        base_loss: of the intact model on the held-out text, nats per token.
        rows: by budget, then by loss.
        skipped: method → why it could not be run.
        facts: model, data, settings and provenance.

    """

    base_loss: float
    rows: tuple[Row, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "base_loss": self.base_loss,
            "rows": [asdict(r) for r in self.rows],
            "skipped": self.skipped,
        } | self.facts


def method_names(text: str | Iterable[str]) -> tuple[str, ...]:
    """Methods by name; `all` stands for every one but those that cost a hundred times the others.

    Raises:
        InputError: an unknown name.

    Examples:
        >>> method_names("norm-ratio,first")
        ('norm-ratio', 'first')

    """
    known = {**CRITERIA, **SUBLAYER_CRITERIA}
    names: list[str] = []
    for name in text.split(",") if isinstance(text, str) else text:
        names += [n for n in known if n not in EXPENSIVE] if name.strip() == ALL else [name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"unknown methods {unknown}; expected 'all' or some of {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def compare(
    loaded: Loaded,
    calibration: Samples,
    held_out: Samples,
    budgets: Sequence[int],
    out: str | Path,
    *,
    methods: Sequence[str] = (ALL,),
    search_tokens: int = 2048,
    random_draws: int = 5,
    energy: str = "fisher",
    protected: Sequence[int] = (),
    seed: int = 0,
    repair: bool = False,
    batch_tokens: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Let every method choose, one at a time, then measure all choices on the same held-out samples.

    A comparison that was interrupted goes on where it stopped, and one that is finished takes further methods and
    budgets: what was chosen and measured in `out` is not done again.

    Args:
        loaded: the model.
        calibration: samples to choose by, the same for all.
        held_out: other samples, to judge by.
        budgets: numbers M of blocks to remove.
        out: folder for everything.
        methods: names in `CRITERIA` and `SUBLAYER_CRITERIA`, or "all".
        search_tokens: methods that measure many candidates do so on the first samples of so many tokens together.
        random_draws: draws of the method `random`, seeds `seed`, `seed` + 1, …
        energy: shown beside the damage, a name in `excise.ising.energies.ENERGIES`.
        protected: blocks that stay.
        seed: of methods with randomness and of the bootstrap.
        repair: also repair every choice in closed form on the first calibration samples, and measure it again; merges,
            single sublayers and what cannot be repaired exactly are left out.
        batch_tokens: padded tokens a batch when measuring the held-out samples.
        progress: shows progress of long stages.

    Returns:
        What is written to `compare.json` in `out`, as an object.

    Raises:
        InputError: an option is out of range.

    """
    stack, folder, names = loaded.stack, Path(out), method_names(methods)
    _check_budgets(stack, budgets, protected)
    check_energy(energy)
    budgets = sorted(set(budgets))
    chooser = _Chooser(stack, calibration, search_tokens, tuple(protected), folder / WORK, progress)
    chosen: list[tuple[str, int, int, Selection]] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            for draw in range(seed, seed + (random_draws if name == RANDOM else 1)):
                chosen += [(name, budget, draw, s) for budget, s in chooser.choose(name, budgets, draw).items()]
        except (ArchitectureError, InputError) as error:
            skipped[name] = str(error)
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
    if not chosen:
        raise InputError("no method could be run: " + "; ".join(f"{n}: {why}" for n, why in skipped.items()))
    with progress("energy", calibration.tokens) as advance:
        gradients, _ = shared_gradients(stack, calibration, folder / WORK / "energy", advance)
    selections = [selection for *_, selection in chosen]
    sums, base, counts = _measure_all(stack, held_out, selections, folder / WORK, batch_tokens, progress)
    choices = [Choice(*choice, values) for choice, values in zip(chosen, sums, strict=True)]
    judge = Judge(stack, ENERGIES[energy](gradients.A), base, counts, seed)
    rows = [row for budget in budgets for row in judge.rows([c for c in choices if c.budget == budget])]
    base_loss = float(base.sum() / counts.sum())
    if repair:
        rows = _with_repair(rows, loaded, calibration, held_out, base_loss, folder / WORK, batch_tokens, progress)
    facts = {
        "model": loaded.source,
        "model_hash": model_identity(stack.model),
        "blocks": len(stack.blocks),
        "parameters": sum(p.numel() for p in stack.model.parameters()),
        "energy": energy,
        "calibration": calibration.describe(),
        "search": calibration.first_tokens(search_tokens).describe(),
        "held_out": held_out.describe(),
        "settings": {
            "seed": seed,
            "methods": list(names),
            "budgets": budgets,
            "random_draws": random_draws,
            "search_tokens": search_tokens,
            "protected": list(protected),
            "repair": repair,
        },
        "provenance": provenance(),
    }
    comparison = Comparison(base_loss, tuple(rows), skipped, facts)
    write_json(folder / MANIFEST, comparison.to_json())
    return comparison


def _with_repair(
    rows: Sequence[Row],
    loaded: Loaded,
    calibration: Samples,
    held_out: Samples,
    base_loss: float,
    work: Path,
    batch_tokens: int | None,
    progress: Progress,
) -> list[Row]:
    """The rows with the damage of each after closed-form repair, where whole blocks are dropped."""

    def dropped(row: Row) -> list[tuple[int, ...]]:
        if row.merge or row.sublayers:
            return []
        return [tuple(draw["removed"]) for draw in row.draws] or [row.removed]

    repairs = repair_removals(
        loaded,
        list(dict.fromkeys(removed for row in rows for removed in dropped(row))),
        calibration,
        held_out,
        work / "repairs",
        batch_tokens=batch_tokens,
        ledger=work / "held-out",
        progress=progress,
    )
    repaired = []
    for row in rows:
        losses = [repairs.loss(removed) for removed in dropped(row)]
        known = [loss for loss in losses if loss is not None]
        mean = float(np.mean(known)) - base_loss if known and len(known) == len(losses) else None
        repaired.append(replace(row, repaired_delta=mean))
    return repaired


def check_energy(name: str) -> None:
    """Refuse an unknown energy.

    Raises:
        InputError: not in `excise.ising.energies.ENERGIES`.

    """
    if name not in ENERGIES:
        raise InputError(f"expected an energy in {', '.join(ENERGIES)}, got '{name}'")


def _check_budgets(stack: Stack, budgets: Sequence[int], protected: Sequence[int]) -> None:
    most = min(len(stack.blocks) - len(protected), len(stack.blocks) - 1)
    outside = [m for m in budgets if not 1 <= m <= most]
    if outside or not budgets:
        raise InputError(f"--remove must be between 1 and {most} (at least one block stays), got {outside or 'none'}")


@dataclass(frozen=True)
class _Chooser:
    """Runs one method, the largest budget first, and keeps what it chose."""

    stack: Stack
    calibration: Samples
    search_tokens: int
    protected: tuple[int, ...]
    work: Path
    progress: Progress

    def choose(self, name: str, budgets: Sequence[int], seed: int) -> dict[int, Selection]:
        """The selection at every budget; nested criteria give the smaller budgets for nothing."""
        chosen: dict[int, Selection] = {}
        largest: Selection | None = None
        for budget in sorted(budgets, reverse=True):
            nested = at_smaller_budget(largest, self.stack, budget) if largest else None
            chosen[budget] = nested or self._kept(name, budget, seed)
            largest = largest or chosen[budget]
        return chosen

    def _kept(self, name: str, budget: int, seed: int) -> Selection:
        samples = self.calibration.first_tokens(self.search_tokens) if name in SEARCHING else self.calibration
        key = {
            "model_hash": model_identity(self.stack.model),
            "samples": samples.hash,
            "protected": list(self.protected),
            "seed": seed,
        }
        path = self.work / f"{name}-{budget}-{seed}.json"
        if path.exists() and (kept := read_json(path))["key"] == key:
            return _selection(kept["selection"])
        started = time.perf_counter()
        with self.progress(f"{name}, M = {budget}", None) as advance:
            selection = {**CRITERIA, **SUBLAYER_CRITERIA}[name](
                self.stack,
                samples,
                budget,
                protected=self.protected,
                seed=seed,
                work=self.work / name,
                advance=advance,
            )
        selection = replace(selection, seconds=time.perf_counter() - started + selection.reused_seconds)
        write_json(path, {"key": key, "selection": asdict(selection)})
        return selection


def _selection(kept: dict[str, Any]) -> Selection:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    return Selection(**{**fields, "trail": tuple(Spent(*spent) for spent in kept["trail"])})


def _measure_all(
    stack: Stack,
    samples: Samples,
    selections: Sequence[Selection],
    work: Path,
    batch_tokens: int | None,
    progress: Progress,
) -> tuple[list[Floats], Floats, Floats]:
    """Loss sums [samples] of every selection, those of the intact model, and counted tokens [samples]."""
    run = partial(measure, stack, samples, batch_tokens=batch_tokens, ledger=work / "held-out")
    dropped = [s.removed for s in selections if not (s.sublayers or s.merge)]
    sums: list[Floats] = []
    with progress("held-out", samples.tokens * (len(selections) + 1)) as advance:
        whole = run([(), *dropped], advance=advance)
        single = run([s.sublayers for s in selections if s.sublayers], sublayers=True, advance=advance)
        for selection in selections:
            if selection.merge:
                with merging(stack, selection.removed, selection.merge):
                    sums.append(run([selection.removed], advance=advance).sums[0])
            elif selection.sublayers:
                sums.append(single.sums[single.removals.index(selection.sublayers)])
            else:
                sums.append(whole.sums[whole.removals.index(selection.removed)])
    return sums, whole.sums[whole.removals.index(())], whole.counts.astype(np.float64)
