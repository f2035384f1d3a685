"""The main job: from a model and a number of blocks to a smaller checkpoint with measured damage."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise.artefacts import read_json, write_json
from excise.calibration.samples import Samples
from excise.criteria import CRITERIA
from excise.energies import ENERGIES, Energy
from excise.errors import InputError, OutputError
from excise.gradients import Gradients
from excise.models.loading import Loaded
from excise.models.stack import Stack, block_indices
from excise.problem import Problem
from excise.progress import Progress, silent
from excise.provenance import model_hash, provenance
from excise.report.figures import write_figures
from excise.score import score
from excise.solvers import solve
from excise.surgery.checkpoint import write_pruned
from excise.surgery.self_test import self_test
from excise.verify import Candidate, Verified, verify

SELECT = ("measured", "energy")
RIVALS = ("block-influence", "block-influence-iterative", "norm-ratio")
MANIFEST = "run.json"
WORK = "work"


@dataclass
class Clock:
    """Seconds each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)


def run(
    loaded: Loaded,
    calibration: Samples,
    held_out: Samples,
    budget: int,
    out: str | Path,
    *,
    energy: str = "fisher",
    solver: str = "auto",
    states: int = 20,
    time_limit: float | None = 60.0,
    verify_states: int = 4,
    min_distance: int = 1,
    random_states: int = 4,
    rivals: Sequence[str] = RIVALS,
    protected: Sequence[int] = (),
    forced: Sequence[int] = (),
    select: str = "measured",
    seed: int = 0,
    batch_tokens: int | None = None,
    checkpointing: bool = False,
    force: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Choose `budget` blocks, remove them, and write the pruned model with its evidence.

    Stages: gradients on `calibration`; the lowest states of every energy; rival criteria on the same samples; measured
    losses of all candidates on `held_out`; the checkpoint; its self-test; figures; `run.json`. A folder in which a run
    of the same settings was interrupted is taken up where it stopped.

    Args:
        loaded: the model.
        calibration: samples to choose by.
        held_out: other samples, to judge by.
        budget: number M of blocks to remove.
        out: folder for everything; the checkpoint is its subfolder `model`.
        energy: the energy shown beside measured losses, and followed where `select` is "energy".
        solver: a name in `excise.solvers.SOLVERS`, or "auto".
        states: length K of the spectra.
        time_limit: seconds for the proof of each; a list not proved by then is the best known, with its gap.
        verify_states: how many of the lowest states of each energy are measured.
        min_distance: smallest Hamming distance between those states.
        random_states: random removals measured beside them, as control.
        rivals: names in `excise.criteria.CRITERIA`.
        protected: blocks that stay.
        forced: blocks that go; they count towards the budget.
        select: "measured" takes the lowest measured loss whoever proposed it, "energy" the ground state.
        seed: of solver and random removals.
        batch_tokens: padded tokens a batch.
        checkpointing: recompute blocks in the backward pass to save memory.
        force: replace a finished run in `out`.
        progress: shows progress of long stages.
        clock: collects seconds per stage; one with earlier stages (loading) may be given.

    Returns:
        What is written to `run.json`.

    Raises:
        InputError: an option is out of range.
        OutputError: `out` exists and is not an unfinished run.

    """
    if energy not in ENERGIES or select not in SELECT:
        raise InputError(f"expected energy in {sorted(ENERGIES)} and select in {SELECT}, got '{energy}' and '{select}'")
    unknown = sorted(set(rivals) - set(CRITERIA))
    if unknown:
        raise InputError(f"unknown criteria {unknown}; known: {sorted(CRITERIA)}")
    clock, stack = clock or Clock(), loaded.stack
    protected, forced = block_indices(stack, protected), block_indices(stack, forced)
    _check_budget(stack, budget, protected, forced)
    folder = _open_folder(out, force)
    work = folder / WORK

    with clock.stage("gradients"):
        gradients = _gradients(stack, calibration, folder, batch_tokens, checkpointing, progress)
    with clock.stage("solve"):
        energies = block_energies(gradients)
        problems = {name: Problem(e, budget, protected=protected, forced=forced) for name, e in energies.items()}
        options: dict[str, Any] = {"states": states, "solver": solver, "seed": seed, "time_limit": time_limit}
        spectra = {name: solve(problem, **options) for name, problem in problems.items()}
        for name, spectrum in spectra.items():
            spectrum.save(folder / f"spectrum-{name}.json")
    proposals = []
    for name, spectrum in spectra.items():
        apart = spectrum.select(verify_states, min_distance=min_distance)
        proposals += [(f"{name}:{spectrum.states.index(state)}", state.removed) for state in apart]
    with clock.stage("rivals"):
        for name in rivals:
            removed = _select(name, stack, calibration, budget, protected, forced, seed, work, progress)
            proposals.append((name, removed))
        for i in range(random_states):
            removed = _select("random", stack, calibration, budget, protected, forced, seed + i, work, progress)
            proposals.append((f"random:{seed + i}", removed))
    with clock.stage("verify"):
        distinct = len({block_indices(stack, removed) for _, removed in proposals}) + 1
        with progress("verify", held_out.tokens * distinct) as advance:
            verified = verify(
                stack,
                held_out,
                proposals,
                energies[energy],
                batch_tokens=batch_tokens,
                ledger=work / "measurements",
                advance=advance,
            )
    chosen = choose(verified, energy, select)
    facts = {
        "model": loaded.source,
        "model_hash": model_hash(stack.model),
        "blocks": len(stack.blocks),
        "budget": budget,
        "removed": list(chosen.removed),
        "proposed_by": [c.method for c in verified.candidates if c.removed == chosen.removed],
        "selected_by": select,
        "base_loss": verified.base_loss,
        "pruned_loss": chosen.loss,
        "base_perplexity": math.exp(verified.base_loss),
        "pruned_perplexity": chosen.perplexity,
        "parameters": sum(p.numel() for p in stack.model.parameters()),
        "pruned_parameters": chosen.parameters,
        "energy": energy,
        "spearman": verified.spearman,
        "candidates": [asdict(c) | {"removed": list(c.removed)} for c in verified.candidates],
        "spectra": {name: f"spectrum-{name}.json" for name in spectra},
        "certified": {name: spectrum.certified for name, spectrum in spectra.items()},
        "calibration": calibration.describe(),
        "held_out": held_out.describe(),
        "skipped_samples": list(gradients.skipped),
        "settings": {
            "seed": seed,
            "states": states,
            "min_distance": min_distance,
            "protected": list(protected),
            "forced": list(forced),
            "rivals": list(rivals),
        },
        "checkpoint": "model",
        "provenance": provenance(),
    }
    with clock.stage("prune"):
        write_pruned(
            stack,
            chosen.removed,
            folder / "model",
            tokenizer=loaded.tokenizer,
            dtype=loaded.stored_dtype,
            card=_card(facts, chosen),
            overwrite=True,
        )
    with clock.stage("self_test"):
        facts["self_test"] = self_test(stack, chosen.removed, folder / "model", _probe_tokens(held_out))
    with clock.stage("figures"):
        facts["figures"] = write_figures(folder / "figures", energies[energy], spectra[energy], verified, chosen)
    facts["seconds"] = clock.seconds
    write_json(folder / MANIFEST, facts)
    return facts


def check_folder(out: str | Path, force: bool) -> Path:
    """Refuse a folder that a run must not write to; touches nothing.

    Raises:
        OutputError: it holds a finished run, or something that is no run at all.

    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose another --out")
    if (folder / MANIFEST).exists() and not force:
        raise OutputError(f"{folder} holds a finished run; choose another --out, or pass --force to replace it")
    if folder.exists() and any(folder.iterdir()) and not (folder / WORK).exists():
        raise OutputError(f"{folder} exists and is no run of excise; choose another --out")
    return folder


def _open_folder(out: str | Path, force: bool) -> Path:
    """Create the folder of a run, or take up an unfinished one; a finished one starts anew."""
    folder = check_folder(out, force)
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder / WORK, ignore_errors=True)
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    return folder


def block_energies(gradients: Gradients) -> dict[str, Energy]:
    """Every energy that follows from gradients, over blocks; a warning they share is given once."""
    columns = gradients.blocks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        energies = {name: build(columns) for name, build in ENERGIES.items()}
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(message, stacklevel=2)
    return energies


def choose(verified: Verified, energy: str, select: str) -> Candidate:
    """The candidate to remove: lowest measured loss, or the energy's ground state."""
    if select == "measured":
        return verified.best
    return next(c for c in verified.candidates if c.method == f"{energy}:0")


def _check_budget(stack: Stack, budget: int, protected: Sequence[int], forced: Sequence[int]) -> None:
    removable = len(stack.blocks) - len(protected)
    most = min(removable, len(stack.blocks) - 1)
    if not 1 <= budget <= most:
        raise InputError(
            f"--remove must be between 1 and {most} ({len(stack.blocks)} blocks, {len(protected)} protected, "
            f"at least one stays), got {budget}"
        )


def _gradients(
    stack: Stack,
    samples: Samples,
    folder: Path,
    batch_tokens: int | None,
    checkpointing: bool,
    progress: Progress,
) -> Gradients:
    path, journal = folder / "gradients.safetensors", folder / WORK / "gradients"
    with progress("gradients", samples.tokens) as advance:
        gradients = score(
            stack,
            samples,
            batch_tokens=batch_tokens,
            checkpointing=checkpointing,
            journal=journal,
            advance=advance,
        )
    assert gradients is not None  # one part: never incomplete
    gradients.save(path)
    return gradients


def _select(
    name: str,
    stack: Stack,
    samples: Samples,
    budget: int,
    protected: Sequence[int],
    forced: Sequence[int],
    seed: int,
    work: Path,
    progress: Progress,
) -> tuple[int, ...]:
    """A criterion's choice, kept on disk; forced blocks go first, the criterion fills the budget."""
    key = {"samples": samples.hash, "budget": budget, "protected": protected, "forced": forced, "seed": seed}
    path = work / f"selection-{name}-{seed}.json"
    if path.exists() and (kept := read_json(path))["key"] == _plain(key):
        return tuple(kept["removed"])
    rest = budget - len(forced)
    if rest == 0:
        return tuple(forced)
    passes = {"block-influence-iterative": rest, "block-influence": 1, "norm-ratio": 1, "random": 0}.get(name)
    with progress(name, None if passes is None else passes * samples.tokens) as advance:
        selection = CRITERIA[name](stack, samples, rest, protected=(*protected, *forced), seed=seed, advance=advance)
    if selection.merge:
        raise InputError(f"{name} merges blocks where a run drops them; leave it out of the rivals")
    removed = tuple(sorted((*selection.removed, *forced)))
    write_json(path, {"key": key, "removed": removed, "selection": asdict(selection)})
    return removed


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}


def _card(facts: dict[str, Any], chosen: Candidate) -> dict[str, Any]:
    calibration, origin = facts["calibration"], facts["provenance"]
    return {
        "original": facts["model"],
        "proposed_by": ", ".join(facts["proposed_by"]),
        "energy": chosen.energy,
        "energy_model": facts["energy"],
        "base_loss": facts["base_loss"],
        "pruned_loss": facts["pruned_loss"],
        "data": {
            "calibration": calibration["data"],
            "samples": calibration["samples"],
            "tokens": calibration["total_tokens"],
        },
        "seed": facts["settings"]["seed"],
        "versions": origin["versions"],
        "command": origin["command"],
    }


def _probe_tokens(samples: Samples) -> Tensor:
    """A few real sequences of one length, for the self-test."""
    longest = sorted(samples, key=lambda sample: -len(sample.input_ids))[:4]
    width = min(len(sample.input_ids) for sample in longest)
    return torch.tensor(np.stack([sample.input_ids[:width] for sample in longest]))
