"""The main job: from a model and a number of blocks to a smaller checkpoint with measured damage.

Its settings, stages and result stand in this one file. What needs torch is imported where it is used: the command line
reads the settings from here, and `--help` must not take seconds.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from excise.artefacts import Artefact, require_free
from excise.choosing.candidate import Candidate
from excise.errors import ArchitectureError, InputError, OutputError
from excise.plain import Facts, Values
from excise.settings import (
    REPAIR_TOKENS,
    BackwardPass,
    Fixing,
    Loading,
    Objecting,
    Porting,
    Printing,
    Replacing,
    Requesting,
    Sampling,
    Weighing,
    changed,
    check_fixed,
    names_in,
    option,
    require_one,
    to_plain,
)
from excise.settings import names as names_of

if TYPE_CHECKING:
    from excise.choosing.brief import Brief
    from excise.choosing.candidate import Verified
    from excise.choosing.objectives import Objective
    from excise.choosing.proposal import Proposal
    from excise.choosing.refine import Refined
    from excise.context import Context
    from excise.data.samples import Samples
    from excise.healing.heal_stage import Healing
    from excise.healing.race import Race
    from excise.ising.energies import Energy
    from excise.ising.problem import Removal
    from excise.ising.spectrum import Spectrum
    from excise.ising.times import Times
    from excise.models.loading import Loaded
    from excise.models.stack import Stack
    from excise.progress import Clock, Progress
    from excise.repair.several import Repairs

MANIFEST, WORK, CHECKPOINT = "run.json", "work", "model"
# What a run writes under names that follow from its settings.
TIMES = "times.json"
REPLACED = ("spectrum-*.json", "spectra-*.json", "energy-*.safetensors", "candidates.json", "panel.json", TIMES)
SELECT = ("measured", "refined", "energy")
# For the proofs at all other budgets together: they are shown and choose nothing.
OTHERS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class RunSettings(
    Printing, Replacing, BackwardPass, Porting, Fixing, Objecting, Sampling, Requesting, Weighing, Loading
):
    """Settings of `excise run`: all of them make its recipe, and stand in its `run.json`."""

    divides = "passes"

    remove: int | None = option(
        None,
        "Number M of blocks to remove, or as --remove-params a share of what they hold, such as 25%.",
        group="What to remove",
        least=1,
        shares="remove_params",
    )
    out: Path = option(
        ..., "Folder for everything; the checkpoint is its `model`.", group="Output", recipe=False, writes="workspace"
    )
    held_out: int = option(
        64, "Samples kept apart: half to choose the best by, half to measure what is written.", group="Data", least=1
    )
    held_out_data: str | None = option(None, "Their source, if not --data itself.", group="Data", reads="data")
    energy: str | None = option(
        None,
        "Energy shown and, with --select energy, followed: fisher, fisher+linear or fitted (of the refinement); by "
        "default fitted, but the paper's fisher where it is followed or nothing is refined.",
        group="How it chooses",
        choices=names_in("excise.ising.energies:ENERGIES", "fitted"),
        hidden=True,
    )
    effort: float = changed(Objecting, "effort", group="What to remove")
    solver: str = option(
        "auto",
        "auto, branch-and-bound, exhaustive, tabu, annealing, or a bridge (docs/bridges.md).",
        group="How it chooses",
        choices=names_in("excise.ising.solvers:SOLVERS", "auto"),
        hidden=True,
    )
    states: int = option(20, "Length K of the spectra.", group="How it chooses", least=1, hidden=True)
    time_limit: float = option(
        60.0,
        "Seconds for the proof of each spectrum; what is not proved by then is the best known, with its gap.",
        group="How it chooses",
        above=0,
        hidden=True,
    )
    verify_states: int = option(4, "States of each energy to measure.", group="How it chooses", least=1, hidden=True)
    min_distance: int = option(
        1, "Smallest Hamming distance between those.", group="How it chooses", least=1, hidden=True
    )
    random_states: int = option(
        4, "Random removals measured beside them, as control.", group="How it chooses", least=0, hidden=True
    )
    rivals: tuple[str, ...] = option(
        ("block-influence", "block-influence-iterative", "norm-ratio"),
        "Criteria that propose removals too, separated by commas; empty for none.",
        group="How it chooses",
        parse=names_of,
        choices=names_in("excise.choosing.criteria:CRITERIA"),
    )
    select: str | None = option(
        None,
        "measured: lowest held-out loss, whoever proposed it, after repair where there was one; refined: lowest "
        "--objective; energy: the ground state. By default measured, or refined where the objective is another than kl "
        "or loss.",
        group="How it chooses",
        choices=SELECT,
    )
    repair: bool = changed(
        Objecting,
        "repair",
        help="Refit what is next to each cut in closed form, where exact and helpful, and choose by what is left.",
    )
    repair_tokens: int = option(
        REPAIR_TOKENS, "Calibration tokens to fit the repair on.", group="How it chooses", least=2, hidden=True
    )
    panel: bool = option(
        True,
        "Ask the result and the original what they can do, as many questions as --effort allows (docs/panel.md).",
        group="Output",
    )
    heal: bool = option(False, "Then train it to predict what the original does.", group="Healing")
    heal_race: int | None = option(
        None, "Heal so many of the best for a while; the winner is removed and healed.", group="Healing", least=2
    )
    heal_preset: str | None = option(
        None,
        "small, paper-llama or paper-qwen.",
        group="Healing",
        choices=names_in("excise.healing.settings:PRESETS"),
        hidden=True,
    )
    heal_data: str | None = option(
        None, "Source of the samples to train on.", group="Healing", hidden=True, reads="data"
    )
    heal_samples: int | None = option(None, "How many.", group="Healing", least=1, hidden=True)
    heal_tokens: int | None = option(None, "Longest of them, in tokens.", group="Healing", least=2, hidden=True)
    heal_batch: int | None = option(None, "Samples per optimiser step.", group="Healing", least=1, hidden=True)
    heal_steps: int | None = option(
        None, "Optimiser steps, instead of the preset's epochs.", group="Healing", least=1, hidden=True
    )
    heal_lr: float | None = option(None, "Peak learning rate.", group="Healing", above=0, hidden=True)
    heal_train: str | None = option(
        None,
        "all, lora, cuts (the blocks next to a cut), refitted (what repair refits), or last (three blocks, head).",
        group="Healing",
        choices=names_in("excise.healing.settings:TRAIN"),
        hidden=True,
    )
    heal_report_to: tuple[str, ...] = option(
        (),
        "Trackers that get the training's curve: tensorboard, wandb, trackio, mlflow and what else transformers knows, "
        "separated by commas; each is set up by its own variables.",
        group="Healing",
        parse=names_of,
        hidden=True,
        recipe=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one(self.remove, [goal.asked for goal in self.goals()])
        check_fixed(self.protect, self.force_blocks, self.remove)
        if self.energy == "fitted" and not self.effort:
            raise InputError("--energy fitted is that of the refinement; it needs an --effort above 0")
        if self.select == "refined" and not self.effort:
            raise InputError("--select refined follows the refinement; it needs an --effort above 0")

    @property
    def heals(self) -> bool:
        """Whether any option of healing was given."""
        given = (self.heal_race, self.heal_preset, *self.training())
        return self.heal or bool(self.heal_report_to) or any(value is not None for value in given)

    def training(self) -> tuple[object, ...]:
        """Options that change the preset of healing."""
        return (
            *(self.heal_data, self.heal_samples, self.heal_tokens, self.heal_batch, self.heal_steps),
            *(self.heal_lr, self.heal_train),
        )

    def followed(self, objective: Objective) -> str:
        """Whom the run follows: as asked, or by what the objective is."""
        if self.select is not None:
            return self.select
        plain = all(term.kind in ("kl", "loss") and term.domains == "mean" for term in objective.terms)
        return "measured" if plain or not self.effort else "refined"


@dataclass(frozen=True)
class RunResult(Artefact):
    """What a run found and wrote, `run.json`.

    Attributes:
        model: as it was named.
        model_hash: its identity.
        blocks: number N of blocks of the original.
        budget: number M of blocks removed.
        asked: what was to be removed: `--remove 8`, `--speedup 1.5`, …
        speed: how many times as fast what was written is, by the times of blocks and as measured: {"predicted":
            {"prefill": …, "decode": …, "request": …}, "measured": …}, with the request and file of the times; None
            where time was not asked for.
        removed: sorted original indices.
        proposed_by: everyone who proposed this removal.
        selected_by: "measured", "refined", "energy" or "race".
        base_loss: of the original, nats per token, on held-out samples by which nothing was chosen.
        pruned_loss: of the removal before any repair, on those.
        base_perplexity: exp(base_loss).
        pruned_perplexity: exp(pruned_loss).
        checkpoint_loss: of what was written, repaired where that helps, on those.
        damage: checkpoint_loss less base_loss, its standard error, and the same in every domain of the samples.
        choice: the other held-out samples, by which the candidates were measured and the best of them chosen, the
            original's loss on them, and those of the repaired that tie with the best.
        parameters: of the original.
        pruned_parameters: of what was written.
        repair: what was repaired and why some were not; None without repair.
        race: how the race went; None without one.
        energy: the energy shown beside measured losses.
        spearman: rank correlation of energy and loss over the distinct candidates; None for fewer than three.
        candidates: all that were measured, on the samples of `choice`, lowest loss first.
        spectra: energy → file of its lowest states.
        certified: energy → whether that list is proved.
        calibration: what the samples to choose by were.
        held_out: what those of `base_loss` were.
        skipped_samples: calibration samples whose gradients were not finite.
        settings: the complete settings, which `excise run --recipe` repeats.
        checkpoint: folder of what was written, relative to this file.
        provenance: versions, machine, command.
        self_test: what loading the checkpoint showed.
        figures: name → file; of the charts of the page, report.html.
        healed: losses, steps and folder of the healing; None without one.
        seconds: per stage.

    """

    model: str
    model_hash: str
    blocks: int
    budget: int
    asked: str
    speed: Facts | None
    removed: tuple[int, ...]
    proposed_by: tuple[str, ...]
    selected_by: str
    base_loss: float
    pruned_loss: float
    base_perplexity: float
    pruned_perplexity: float
    checkpoint_loss: float
    damage: Facts
    choice: Facts
    parameters: int
    pruned_parameters: int
    repair: Facts | None
    race: Facts | None
    energy: str
    spearman: float | None
    candidates: tuple[Candidate, ...]
    spectra: dict[str, str]
    certified: dict[str, bool]
    calibration: Facts
    held_out: Facts
    skipped_samples: tuple[str, ...]
    settings: Facts
    checkpoint: str
    provenance: Facts
    self_test: Facts
    figures: dict[str, str]
    healed: Facts | None
    seconds: dict[str, float]


def run(
    loaded: Loaded,
    calibration: Samples,
    held_out: Samples,
    settings: RunSettings,
    *,
    healing: Healing | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
    made_by: str | None = None,
) -> RunResult:
    """Choose blocks, remove them, and write the pruned model with its evidence.

    Stages: gradients on `calibration`; refinement; the lowest states of every energy; rival criteria on the same
    samples; measured losses of all candidates on `held_out`; closed-form repair of the best; the race, the checkpoint;
    its self-test; healing; the panel; the page and its figures; `run.json`. A folder in which a run was interrupted is
    taken up where it stopped.

    Args:
        loaded: the model.
        calibration: samples to choose by.
        held_out: other samples: half of them choose among the candidates, half measure what was chosen.
        settings: everything else that is asked.
        healing: train the pruned model afterwards, into the subfolder `healed`; with a race, what wins it is removed,
            whatever `select` says.
        progress: shows progress of long stages.
        clock: collects seconds per stage; one with earlier stages (loading) may be given.
        made_by: key of the job, by which it is recognised as done; see `excise.job.made_by`.

    Returns:
        What is written to `run.json`.

    Raises:
        InputError: an option is out of range.
        OutputError: `out` exists and is not an unfinished run.
        ArchitectureError: nothing that is proposed leaves a model that a config can describe.

    """
    from excise.choosing.amounts import given_times
    from excise.choosing.engines import engine_of
    from excise.choosing.follow import chosen_of
    from excise.choosing.judged import halves
    from excise.choosing.objectives import load_objective
    from excise.context import Context
    from excise.progress import Clock, Progress
    from excise.store import Store
    from excise.team import team as joined

    clock = clock or Clock()
    times = given_times(loaded.stack, settings.times)
    if settings.timed and times is None:
        # What cannot be timed is refused before a folder is opened.
        engine_of(settings.engine, loaded)
    brief = _brief(loaded, settings, times)
    if healing:
        healing.require_feasible()
    objective = load_objective(settings, calibration, loaded, settings.seed)
    team = joined()
    folder = team.once(lambda: _open_folder(settings, loaded, healing))
    context = Context(loaded, Store(folder / WORK), progress or Progress(), settings.batch_tokens)
    if settings.timed and times is None:
        times = team.once(lambda: _times(context, settings, folder, clock))
        brief = _brief(loaded, settings, times)
    select, energy = settings.followed(objective), settings.energy
    energy = energy or ("fisher" if select == "energy" or not settings.effort else "fitted")
    choosing, judging = halves(held_out)
    proposed = _propose(context, calibration, objective, brief, settings, folder, clock)
    verified = _verify(context, choosing, proposed, energy, clock)
    contenders = _contenders(verified, energy, select, healing, objective)
    repairs = _repair(context, contenders, calibration, choosing, settings, clock)
    verified = verified.with_repairs(repairs.loss)
    chosen, won, standings = chosen_of(verified, energy, select), None, None
    tied: list[Facts] = []
    if healing and healing.race > 1 and len(contenders) > 1:
        entrants = [c.removed for c in verified.ranked[: healing.race]]
        won, winner, standings = _race(healing, context, entrants, repairs, choosing, clock)
        select, chosen = "race", next(c for c in verified.candidates if c.removed == winner)
    elif select == "measured":
        chosen, tied = _settled(context, choosing, verified, contenders, repairs, clock)
    facts = {
        **_choice_facts(loaded, verified, chosen, settings, select, energy),
        **_damage_facts(context, judging, chosen, repairs, clock),
        "choice": {"samples": choosing.describe(), "base_loss": verified.base_loss, "tied": tied},
        "repair": {"applied": bool(repairs.helpful(chosen.removed)), **repairs.describe()} if settings.repair else None,
        "race": standings,
        "spectra": {name: f"spectrum-{name}.json" for name in proposed.spectra},
        "certified": {name: spectrum.certified for name, spectrum in proposed.spectra.items()},
        "calibration": calibration.describe(),
        "held_out": judging.describe(),
        "skipped_samples": proposed.skipped,
    }
    facts |= team.once(lambda: _write(context, chosen, repairs, facts, judging, folder, clock))
    facts["speed"] = team.once(lambda: _speed(context, chosen, times, clock)) if times else None
    facts["healed"] = _heal(healing, context, judging, folder, won, clock) if healing else None
    if settings.panel:
        team.once(lambda: _panel(context, chosen, repairs, facts["healed"], settings, folder, clock))
        team.once(lambda: _panel_in_cards(folder, facts["healed"], proposed.spectra[energy], energy))
    with clock.stage("solve"):
        team.once(lambda: _save_other_budgets(context, brief, energy, proposed, settings, folder))
    result = RunResult(**facts, figures={}, seconds=clock.seconds)
    figures = team.once(lambda: _report(result, folder, clock))
    result = replace(result, figures=figures)
    result.save(folder / MANIFEST, key=made_by)
    return result


@dataclass(frozen=True)
class _Proposed:
    """What all who propose removals said."""

    energies: Mapping[str, Energy]
    spectra: Mapping[str, Spectrum]
    proposals: Sequence[Proposal]
    skipped: tuple[str, ...]


def _propose(
    context: Context,
    calibration: Samples,
    objective: Objective,
    brief: Brief,
    settings: RunSettings,
    folder: Path,
    clock: Clock,
) -> _Proposed:
    """Gradients, refinement, the lowest states of every energy, rivals and chance."""
    from excise.choosing.states import block_energies, lowest_states
    from excise.measuring.score import score

    with clock.stage("gradients"):
        gradients = score(context, calibration, checkpointing=settings.checkpointing)
        gradients.save(folder / "gradients.safetensors")
    energies, proposals = block_energies(gradients), []
    if settings.effort:
        with clock.stage("refine"):
            refined = _refine(context, calibration, objective, brief, settings, folder)
        energies["fitted"] = refined.energy()
        energies["fitted"].save(folder / "energy-fitted.safetensors")
        proposals += refined.proposals()[: settings.verify_states]
    spectra: dict[str, Spectrum] = {}
    with clock.stage("solve"):
        for name, energy in energies.items():
            # By one process for all: under a time limit two could find different states.
            spectra[name] = context.team.once(partial(_solved, context.stack, energy, brief, settings))
            spectra[name].save(folder / f"spectrum-{name}.json")
            proposals += lowest_states(name, spectra[name], settings.verify_states, settings.min_distance)
    with clock.stage("rivals"):
        proposals += _rivals(context, calibration, brief, settings)
    return _Proposed(energies, spectra, _writable(context.stack, brief, proposals), gradients.skipped)


def _solved(stack: Stack, energy: Energy, brief: Brief, settings: RunSettings) -> Spectrum:
    from excise.ising.solvers import solve

    return solve(
        brief.problem(stack, energy),
        states=settings.states,
        solver=settings.solver,
        seed=settings.seed,
        time_limit=settings.time_limit,
    )


def _refine(
    context: Context, calibration: Samples, objective: Objective, brief: Brief, settings: RunSettings, folder: Path
) -> Refined:
    from excise.artefacts import write_artefact
    from excise.choosing.refine import refine, refinement_facts

    refined = refine(context, objective, brief, tokens=settings.effort * calibration.tokens)
    found = refinement_facts({len(refined.removed): refined}, objective, settings.effort, calibration)
    write_artefact(folder / "candidates.json", {"model": context.loaded.source, **found})
    return refined


def _rivals(context: Context, calibration: Samples, brief: Brief, settings: RunSettings) -> list[Proposal]:
    from excise.choosing.criteria import RANDOM
    from excise.choosing.pipeline import propose_amount

    proposals = [propose_amount(context, calibration, name, brief) for name in settings.rivals]
    for proposal in proposals:
        if proposal.merge:
            raise InputError(f"{proposal.method} merges blocks where a run drops them; leave it out of the rivals")
    for seed in range(settings.seed, settings.seed + settings.random_states):
        drawn = propose_amount(context, calibration, RANDOM, replace(brief, seed=seed))
        proposals.append(replace(drawn, method=f"{RANDOM}:{seed}"))
    return proposals


def _writable(stack: Stack, brief: Brief, proposals: Sequence[Proposal]) -> list[Proposal]:
    """Leave out removals that no config can describe, that break the pattern asked for or weigh another amount."""
    from excise.surgery.config import is_writable

    allowed = [proposal for proposal in proposals if brief.allows(proposal.removed)]
    if len(allowed) < len(proposals):
        others = ", ".join(p.method for p in proposals if not brief.allows(p.removed))
        what = "the pattern that --portable keeps, or weigh too little or too much"
        warnings.warn(f"left out, since they break {what}: {others}", stacklevel=3)
    kept = [proposal for proposal in allowed if is_writable(stack, proposal.removed)]
    if len(kept) < len(allowed):
        left_out = ", ".join(p.method for p in allowed if not is_writable(stack, p.removed))
        warnings.warn(f"left out, since no config describes what they leave: {left_out}", stacklevel=3)
    if not kept:
        raise ArchitectureError(
            f"no proposed removal leaves a {stack.model.config.model_type} that a config can describe; "
            f"try another --remove, or --protect the blocks that must stay"
        )
    return kept


def _verify(context: Context, held_out: Samples, proposed: _Proposed, energy: str, clock: Clock) -> Verified:
    from excise.choosing.verify import verify

    with clock.stage("verify"):
        return verify(context, held_out, proposed.proposals, proposed.energies[energy])


def _contenders(
    verified: Verified, energy: str, select: str, healing: Healing | None, objective: Objective
) -> Sequence[Candidate]:
    from excise.choosing.follow import contenders

    return contenders(verified, energy, select, healing.race if healing else 1, after_repair=objective.repaired)


def _settled(
    context: Context,
    choosing: Samples,
    verified: Verified,
    contenders: Sequence[Candidate],
    repairs: Repairs,
    clock: Clock,
) -> tuple[Candidate, list[Facts]]:
    """Of the contenders that tie with the best as they would be written, the one whose worst domain suffers least."""
    from excise.choosing.judged import judge, settled

    with clock.stage("verify"):
        removed, tied = settled(judge(context, choosing, [c.removed for c in contenders], repairs))
    return next(c for c in verified.ranked if c.removed == removed), tied


def _damage_facts(context: Context, judging: Samples, chosen: Candidate, repairs: Repairs, clock: Clock) -> Facts:
    """Losses of what was chosen, on samples by which nothing was chosen."""
    from excise.choosing.judged import judge

    with clock.stage("verify"):
        (pruned,) = judge(context, judging, [chosen.removed])
        (written,) = judge(context, judging, [chosen.removed], repairs)
    return {
        "base_loss": written.base_loss,
        "pruned_loss": pruned.loss,
        "base_perplexity": _perplexity(written.base_loss),
        "pruned_perplexity": _perplexity(pruned.loss),
        "checkpoint_loss": written.loss,
        "damage": {**written.describe(), "pruned_domains": pruned.by_domain()},
    }


def _perplexity(loss: float) -> float:
    # exp overflows a float at 709.8.
    return math.exp(loss) if loss < 700 else math.inf


def _repair(
    context: Context,
    contenders: Sequence[Candidate],
    calibration: Samples,
    held_out: Samples,
    settings: RunSettings,
    clock: Clock,
) -> Repairs:
    from excise.repair.several import Repairs, repair_removals

    if not settings.repair:
        return Repairs()
    removals = [candidate.removed for candidate in contenders]
    with clock.stage("repair"):
        repairs = repair_removals(context, removals, calibration, held_out, tokens=settings.repair_tokens)
    if reasons := "; ".join(dict.fromkeys(repairs.refused.values())):
        warnings.warn(f"not repaired (--no-repair leaves this out): {reasons}", stacklevel=3)
    return repairs


def _race(
    healing: Healing,
    context: Context,
    entrants: Sequence[Removal],
    repairs: Repairs,
    held_out: Samples,
    clock: Clock,
) -> tuple[Race, Removal, Facts]:
    """The race, the removal that won it, and the race as plain data, with removals in place of its checkpoints."""
    from excise.healing.heal_stage import race_removals

    with clock.stage("race"):
        won, places = race_removals(healing, context, entrants, repairs, held_out)
    facts = won.describe()
    rows = [{"removed": list(places[row["student"]]), "losses": row["losses"]} for row in facts["standings"]]
    return won, places[won.winner.student], {**facts, "standings": rows}


def _choice_facts(
    loaded: Loaded, verified: Verified, chosen: Candidate, settings: RunSettings, select: str, energy: str
) -> Facts:
    from excise.artefacts.provenance import provenance
    from excise.models.identity import model_identity

    stack = loaded.stack
    return {
        "model": loaded.source,
        "model_hash": model_identity(stack.model),
        "blocks": len(stack.blocks),
        "budget": len(chosen.removed),
        "asked": " ".join(goal.asked for goal in settings.goals()) or f"--remove {settings.remove}",
        "removed": chosen.removed,
        "proposed_by": tuple(c.method for c in verified.candidates if c.removed == chosen.removed),
        "selected_by": select,
        "parameters": sum(p.numel() for p in stack.model.parameters()),
        "pruned_parameters": chosen.parameters,
        "energy": energy,
        "spearman": verified.spearman,
        "candidates": verified.candidates,
        "settings": to_plain(settings),
        "checkpoint": CHECKPOINT,
        "provenance": provenance(),
    }


def _write(
    context: Context,
    chosen: Candidate,
    repairs: Repairs,
    facts: Values,
    held_out: Samples,
    folder: Path,
    clock: Clock,
) -> Facts:
    """Write the checkpoint, load it again, and only then give it its name."""
    from excise.data.batches import longest_together
    from excise.repair.several import write_removal
    from excise.surgery.check import check_loaded

    loaded, removed, card = context.loaded, chosen.removed, _card(facts, chosen, repairs)
    probe = longest_together(held_out)

    def test(place: Path) -> Facts:
        with clock.stage("self_test"):
            return check_loaded(loaded.stack, removed, place, probe, source=loaded.folder, stored=loaded.stored_dtype)

    with clock.stage("prune"):
        written = write_removal(loaded, removed, repairs, folder / CHECKPOINT, card, test)
    return {"self_test": written["self_test"]}


def _heal(healing: Healing, context: Context, held_out: Samples, folder: Path, won: Race | None, clock: Clock) -> Facts:
    from excise.healing.heal_stage import FOLDER, heal_pruned

    out = folder / FOLDER
    with clock.stage("heal"):
        return heal_pruned(healing, folder / CHECKPOINT, held_out, out, context.store, won=won)


def _panel(
    context: Context,
    chosen: Candidate,
    repairs: Repairs,
    healed: Facts | None,
    settings: RunSettings,
    folder: Path,
    clock: Clock,
) -> None:
    """Ask the original what it can do, and then itself without the blocks removed, which is what was written."""
    from excise.evaluation.panel.panel import FILE, asked, panel_of, reference
    from excise.evaluation.panel.questions import limit_at
    from excise.models.loading import load
    from excise.models.residency import is_offloaded
    from excise.models.stack import find_stack
    from excise.surgery.checkpoint import pruned
    from excise.team import Team

    loaded, removed = context.loaded, chosen.removed
    if any(is_offloaded(block.module) for block in loaded.stack.blocks):
        warnings.warn("no panel: every token of an answer would read all weights of a streamed model", stacklevel=3)
        return
    # Answers are written token by token, by one process.
    context = replace(context, team=Team())
    try:
        with clock.stage("panel"):
            original = reference(context, loaded.source, limit_at(settings.effort))
            with repairs.applied(loaded.stack, removed), pruned(loaded.stack, removed) as model:
                without = replace(loaded, stack=find_stack(model))
                results = [asked(context.of(without), str(folder / CHECKPOINT), original)]
            if healed:
                place = str(folder / healed["checkpoint"])
                # In memory as the original is, of which no block waits; a device map names its blocks, not these.
                how = {**settings.loading(), "placement": "auto"}
                results.append(asked(context.of(load(place, **how)), place, original))
            panel_of(original, results).save(folder / FILE)
    # What does not generate, or cannot be asked, can be pruned all the same.
    except (ArchitectureError, InputError) as error:
        warnings.warn(f"no panel (--no-panel leaves it out): {error}", stacklevel=3)


def _panel_in_cards(folder: Path, healed: Facts | None, spectrum: Spectrum, energy: str) -> None:
    from excise.evaluation.panel.panel import known_panel
    from excise.evaluation.scores import Scores
    from excise.surgery.card_scores import update_card

    for name in (CHECKPOINT, *([healed["checkpoint"]] if healed else [])):
        if panel := known_panel(str(folder / name), [folder]):
            update_card(folder / name, Scores(), "", spectrum, energy, panel)


def _save_other_budgets(
    context: Context, brief: Brief, energy: str, proposed: _Proposed, settings: RunSettings, folder: Path
) -> None:
    """Keep the lowest states of the energy shown at the budgets around the one asked for: the page shows them all."""
    from excise.artefacts import write_artefact
    from excise.choosing.states import around

    spectra = around(
        brief.problem(context.stack, proposed.energies[energy]),
        states=settings.states,
        solver=settings.solver,
        seed=settings.seed,
        time_limit=min(settings.time_limit, OTHERS_SECONDS),
    )
    if spectra:
        write_artefact(folder / f"spectra-{energy}.json", {"spectra": [s.to_json() for s in spectra.values()]})


def _report(result: RunResult, folder: Path, clock: Clock) -> dict[str, str]:
    from excise.report.figures import write_run_report

    with clock.stage("report"):
        return write_run_report(folder, result.to_json())


def _card(facts: Values, chosen: Candidate, repairs: Repairs) -> Facts:
    calibration, origin, helpful = facts["calibration"], facts["provenance"], repairs.helpful(chosen.removed)
    return {
        "original": facts["model"],
        "proposed_by": ", ".join(facts["proposed_by"]),
        "energy": chosen.energy,
        "energy_model": facts["energy"],
        "base_loss": facts["base_loss"],
        "pruned_loss": facts["pruned_loss"],
        **({"repaired_loss": facts["checkpoint_loss"], "repair": helpful.describe()} if helpful else {}),
        "data": {
            "calibration": calibration["data"],
            "samples": calibration["samples"],
            "tokens": calibration["total_tokens"],
        },
        "seed": facts["settings"]["seed"],
        "versions": origin["versions"],
        "command": origin["command"],
    }


def _times(context: Context, settings: RunSettings, folder: Path, clock: Clock) -> Times:
    from excise.choosing.timing import kept_times
    from excise.ising.times import Request

    with clock.stage("times"):
        request = Request(settings.prompt_tokens, settings.new_tokens)
        return kept_times(context, request, settings.engine, folder / TIMES)


def _speed(context: Context, chosen: Candidate, times: Times, clock: Clock) -> Facts:
    """What the times promise for a removal, and what it takes here."""
    from excise.choosing.timing import predicted_and_measured

    with clock.stage("times"):
        return predicted_and_measured(context.loaded, chosen.removed, times)


def _brief(loaded: Loaded, settings: RunSettings, times: Times | None) -> Brief:
    from excise.choosing.amounts import amounts_of
    from excise.choosing.brief import Brief
    from excise.models.portable import pattern_of

    stack = loaded.stack
    pattern = pattern_of(stack.architecture, stack.model.config, settings.portable, loaded.raw_config)
    return Brief.on(
        stack,
        settings.remove,
        protected=settings.protect,
        forced=settings.force_blocks,
        seed=settings.seed,
        pattern=pattern,
        amounts=amounts_of(stack, settings, times, settings.protect),
    )


def check_folder(settings: RunSettings) -> Path:
    """Refuse a folder that a run must not write to; touches nothing.

    Raises:
        OutputError: it holds a finished run, or something that is no run at all.

    """
    from excise.report.page import PAGE, require_page

    folder = require_free(settings.out, folder=True, inputs=[settings.model], adds=True)
    if (folder / MANIFEST).exists() and not settings.force:
        raise OutputError(f"{folder} holds a finished run; choose another --out, or pass --force to replace it")
    require_page(folder / PAGE)
    return folder


def _open_folder(settings: RunSettings, loaded: Loaded, healing: Healing | None) -> Path:
    """Create the folder of a run, or take up an unfinished one; a finished one starts anew."""
    from excise.healing.heal_stage import FOLDER
    from excise.surgery.feasible import require_writable

    folder = check_folder(settings)
    # Headers say now what writing would refuse after hours of gradients.
    require_writable(loaded.folder, folder / CHECKPOINT, overwrite=True)
    if healing:
        require_free(folder / FOLDER, folder=True, force=True)
    if (folder / MANIFEST).exists():
        # First the mark of a finished run, so that what follows is taken up if it is interrupted.
        (folder / MANIFEST).unlink()
        for part in (FOLDER, WORK, "figures"):
            shutil.rmtree(folder / part, ignore_errors=True)
        # The page shows whatever the folder holds, of the earlier run too.
        for path in (path for name in REPLACED for path in folder.glob(name)):
            path.unlink()
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    return folder
