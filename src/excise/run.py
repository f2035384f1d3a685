"""The main job: from a model and a number of blocks to a smaller checkpoint with measured damage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from excise.artefacts import write_json
from excise.choosing.criteria import CRITERIA
from excise.choosing.follow import check_choices, choose, contenders
from excise.choosing.proposals import Proposal, Proposer, block_energies, lowest_states
from excise.choosing.refine import DEFAULT_EFFORT, refinement_facts
from excise.choosing.verify import Candidate, verify
from excise.data.batches import longest_together
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.healing import heal_stage
from excise.healing.heal import check_destination
from excise.healing.heal_stage import Healing, heal_pruned, race_removals
from excise.healing.race import Race
from excise.ising.gradients import Gradients
from excise.measuring.objectives import Objective, parse_objective
from excise.measuring.score import score
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.models.stack import Stack, block_indices
from excise.progress import Clock, Progress, silent
from excise.provenance import provenance
from excise.repair import repair_stage
from excise.repair.repair_stage import Repairs, repair_removals, write_removal
from excise.report.figures import write_figures
from excise.run_folder import MANIFEST, WORK, open_folder
from excise.surgery.check import check_loaded
from excise.surgery.config import is_writable

RIVALS = ("block-influence", "block-influence-iterative", "norm-ratio")


def run(
    loaded: Loaded,
    calibration: Samples,
    held_out: Samples,
    budget: int,
    out: str | Path,
    *,
    energy: str | None = None,
    effort: float = DEFAULT_EFFORT,
    objective: Objective | None = None,
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
    repair: bool = True,
    repair_tokens: int = repair_stage.TOKENS,
    healing: Healing | None = None,
    force: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Choose `budget` blocks, remove them, and write the pruned model with its evidence.

    Stages: gradients on `calibration`; the lowest states of every energy; refinement; rival criteria on the same
    samples; measured losses of all candidates on `held_out`; closed-form repair of the best; the race, the checkpoint;
    its self-test; figures; healing; `run.json`. A folder in which a run of the same settings was interrupted is taken
    up where it stopped.

    Args:
        loaded: the model.
        calibration: samples to choose by.
        held_out: other samples, to judge by.
        budget: number M of blocks to remove.
        out: folder for everything; the checkpoint is its subfolder `model`.
        energy: the energy shown beside measured losses, and followed where `select` is "energy": "fisher",
            "fisher+linear" or "fitted", that of the refinement. By default "fitted", but the paper's "fisher" where it
            is followed or nothing is refined.
        effort: what refinement may cost, in passes over the calibration samples; 0 for none.
        objective: the damage it keeps low; by default the divergence from the intact model on `calibration`.
        solver: a name in `excise.ising.solvers.SOLVERS`, or "auto".
        states: length K of the spectra.
        time_limit: seconds for the proof of each; a list not proved by then is the best known, with its gap.
        verify_states: how many of the lowest states of each energy are measured.
        min_distance: smallest Hamming distance between those states.
        random_states: random removals measured beside them, as control.
        rivals: names in `excise.choosing.criteria.CRITERIA`.
        protected: blocks that stay.
        forced: blocks that go; they count towards the budget.
        select: "measured" takes the lowest measured loss whoever proposed it, after repair where there was one;
            "refined" what refinement found by its own objective, "energy" the ground state.
        seed: of solver and random removals.
        batch_tokens: padded tokens a batch.
        checkpointing: recompute blocks in the backward pass to save memory.
        repair: fit the closed-form repair (see `excise.repair.repair`) of the three that measured best, or of what
            `select` names, on the calibration samples; it is written where it lowers the loss. What cannot be repaired
            exactly is left as it is, with a warning.
        repair_tokens: of calibration samples to fit it on.
        healing: train the pruned model afterwards, into the subfolder `healed`; with a race, what wins it is removed,
            whatever `select` says.
        force: replace a finished run in `out`.
        progress: shows progress of long stages.
        clock: collects seconds per stage; one with earlier stages (loading) may be given.

    Returns:
        What is written to `run.json`.

    Raises:
        InputError: an option is out of range.
        OutputError: `out` exists and is not an unfinished run.

    """
    energy = check_choices(energy, select, effort)
    unknown = sorted(set(rivals) - set(CRITERIA))
    if unknown:
        raise InputError(f"unknown criteria {unknown}; known: {sorted(CRITERIA)}")
    clock, stack = clock or Clock(), loaded.stack
    protected, forced = block_indices(stack, protected), block_indices(stack, forced)
    protected = tuple(sorted({*protected, *stack.fixed}))
    _check_budget(stack, budget, protected, forced)
    if healing:
        healing.require_feasible()
    folder = open_folder(out, force)
    if healing:
        check_destination(folder / heal_stage.FOLDER, str(folder / "model"), force)
    work = folder / WORK

    with clock.stage("gradients"):
        gradients = _gradients(stack, calibration, folder, batch_tokens, checkpointing, progress)
    proposer = Proposer(stack, calibration, budget, protected, forced, seed, work, progress)
    energies = block_energies(gradients)
    proposals: list[Proposal] = []
    if effort:
        with clock.stage("refine"):
            objective = objective or parse_objective("kl", calibration)
            refined = proposer.refined(objective, effort * calibration.tokens)
            found = refinement_facts({budget: refined}, objective, effort, calibration)
            write_json(folder / "candidates.json", {"model": loaded.source, **found})
        energies["fitted"] = refined.energy()
        energies["fitted"].save(folder / "energy-fitted.safetensors")
        proposals += [(f"refined:{k}", f.removed) for k, f in enumerate(refined.finalists[:verify_states])]
    with clock.stage("solve"):
        spectra = proposer.spectra(energies, states=states, solver=solver, time_limit=time_limit)
        for name, spectrum in spectra.items():
            spectrum.save(folder / f"spectrum-{name}.json")
            proposals += lowest_states(name, spectrum, verify_states, min_distance)
    with clock.stage("rivals"):
        proposals += proposer.rivals(rivals, random_states)
    proposals = _writable(stack, proposals)
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
    chosen_from = contenders(verified, energy, select, healing)
    repairs = Repairs()
    if repair:
        with clock.stage("repair"):
            repairs = repair_removals(
                loaded,
                [c.removed for c in chosen_from],
                calibration,
                held_out,
                work / "repairs",
                tokens=repair_tokens,
                batch_tokens=batch_tokens,
                ledger=work / "measurements",
                progress=progress,
            )
        _tell_refused(repairs)
        verified = verified.with_repairs(repairs.loss)
    chosen, won = choose(verified, energy, select), None
    if healing and healing.race > 1 and len(chosen_from) > 1:
        with clock.stage("race"):
            entrants = [c.removed for c in verified.ranked[: healing.race]]
            won, places = race_removals(healing, loaded, entrants, repairs, held_out, work)
        select = "race"
        chosen = next(c for c in verified.candidates if c.removed == places[won.winner.student])
    facts: dict[str, Any] = {
        "model": loaded.source,
        "model_hash": model_identity(stack.model),
        "blocks": len(stack.blocks),
        "budget": budget,
        "removed": list(chosen.removed),
        "proposed_by": [c.method for c in verified.candidates if c.removed == chosen.removed],
        "selected_by": select,
        "base_loss": verified.base_loss,
        "pruned_loss": chosen.loss,
        "base_perplexity": math.exp(verified.base_loss),
        "pruned_perplexity": chosen.perplexity,
        "checkpoint_loss": chosen.best_loss,
        "parameters": sum(p.numel() for p in stack.model.parameters()),
        "pruned_parameters": chosen.parameters,
        "repair": {"applied": bool(repairs.helpful(chosen.removed)), **repairs.describe()} if repair else None,
        "race": won and _standings(won, places),
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
            "effort": effort,
            "objective": objective.name if objective and effort else None,
            "repair_tokens": repair_tokens if repair else None,
        },
        "checkpoint": "model",
        "provenance": provenance(),
    }

    def test(place: Path) -> dict[str, Any]:
        with clock.stage("self_test"):
            return check_loaded(
                stack,
                chosen.removed,
                place,
                longest_together(held_out),
                source=loaded.folder,
                stored=loaded.stored_dtype,
            )

    with clock.stage("prune"):
        card = _card(facts, chosen, repairs)
        written = write_removal(loaded, chosen.removed, repairs, folder / "model", card, test)
        facts["self_test"] = written["self_test"]
    with clock.stage("figures"):
        facts["figures"] = write_figures(folder / "figures", energies[energy], spectra[energy], verified, chosen)
    if healing:
        with clock.stage("heal"):
            out = folder / heal_stage.FOLDER
            facts["healed"] = heal_pruned(healing, folder / "model", held_out, out, work, won=won, force=force)
    facts["seconds"] = clock.seconds
    write_json(folder / MANIFEST, facts)
    return facts


def _tell_refused(repairs: Repairs) -> None:
    reasons = "; ".join(dict.fromkeys(repairs.refused.values()))
    if reasons:
        warnings.warn(f"not repaired (--no-repair leaves this out): {reasons}", stacklevel=3)


def _standings(race: Race, places: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A race as plain data, with removals in place of the checkpoints in the work folder."""
    facts = race.describe()
    rows = [{"removed": list(places[row["student"]]), "losses": row["losses"]} for row in facts["standings"]]
    return {**facts, "standings": rows}


def _writable(stack: Stack, proposals: Sequence[Proposal]) -> list[Proposal]:
    """Leave out removals that no config can describe."""
    kept = [proposal for proposal in proposals if is_writable(stack, proposal[1])]
    if len(kept) < len(proposals):
        left_out = ", ".join(name for name, removed in proposals if not is_writable(stack, removed))
        warnings.warn(f"left out, since no config describes what they leave: {left_out}", stacklevel=2)
    if not kept:
        raise ArchitectureError(
            f"no proposed removal leaves a {stack.model.config.model_type} that a config can describe; "
            f"try another --remove, or --protect the blocks that must stay"
        )
    return kept


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


def _card(facts: dict[str, Any], chosen: Candidate, repairs: Repairs) -> dict[str, Any]:
    calibration, origin, helpful = facts["calibration"], facts["provenance"], repairs.helpful(chosen.removed)
    return {
        "original": facts["model"],
        "proposed_by": ", ".join(facts["proposed_by"]),
        "energy": chosen.energy,
        "energy_model": facts["energy"],
        "base_loss": facts["base_loss"],
        "pruned_loss": facts["pruned_loss"],
        **({"repaired_loss": chosen.repaired_loss, "repair": helpful.describe()} if helpful else {}),
        "data": {
            "calibration": calibration["data"],
            "samples": calibration["samples"],
            "tokens": calibration["total_tokens"],
        },
        "seed": facts["settings"]["seed"],
        "versions": origin["versions"],
        "command": origin["command"],
    }
