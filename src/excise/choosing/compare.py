"""Every criterion on one model: same calibration, same held-out text, same cost accounting."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from excise.artefacts import Artefact
from excise.artefacts.provenance import provenance
from excise.choosing.brief import Brief
from excise.choosing.contest import Contest
from excise.choosing.criteria import RANDOM, SEARCHING
from excise.choosing.intervals import Choice, Floats, Judge, Row
from excise.choosing.pipeline import measure_proposals, propose_budgets, repaired_sums
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.ising.energies import ENERGIES
from excise.ising.problem import Removal
from excise.measuring.score import score
from excise.plain import Facts
from excise.settings import REPAIR_TOKENS

MANIFEST = "compare.json"
WORK = "work"


@dataclass(frozen=True)
class Comparison(Artefact):
    """All methods at all budgets, `compare.json`.

    Attributes:
        base_loss: of the intact model on the held-out text, nats per token.
        rows: by budget, then by loss.
        skipped: method → why it could not be run.
        model: as it was named.
        model_hash: its identity.
        blocks: number N of blocks.
        parameters: of the intact model.
        energy: shown beside the damage.
        calibration: what the samples to choose by were.
        search: what those were that methods measure many candidates on.
        held_out: what those to judge by were.
        settings: seed, methods, budgets and terms.
        provenance: versions, machine, command.

    """

    base_loss: float
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    model: str
    model_hash: str
    blocks: int
    parameters: int
    energy: str
    calibration: Facts
    search: Facts
    held_out: Facts
    settings: Facts
    provenance: Facts


def compare(
    context: Context,
    calibration: Samples,
    held_out: Samples,
    brief: Brief,
    budgets: Sequence[int],
    contest: Contest,
) -> Comparison:
    """Let every method choose, one at a time, then measure all choices on the same held-out samples.

    What was chosen and measured is in the store: a comparison that was interrupted goes on where it stopped, and one
    that is finished takes further methods and budgets.

    Args:
        context: the model and the store.
        calibration: samples to choose by, the same for all.
        held_out: other samples, to judge by.
        brief: what is asked of every method, but for the budget; its seed is that of the bootstrap too.
        budgets: numbers M of blocks to remove.
        contest: who takes part, and on what terms.

    Raises:
        InputError: a budget does not fit, or no method can be run.

    """
    budgets = sorted(set(budgets))
    for budget in budgets:
        # All budgets before the first method runs: a comparison may take hours, and must not end on the last one's
        # typing error.
        replace(brief, budget=budget).candidates(context.stack)
    brief = replace(brief, repaired=contest.repair)
    entries, skipped = _entries(context, calibration, brief, budgets, contest)
    # Shared through the store with the criteria that took them.
    gradients = score(context, calibration)
    measured = measure_proposals(context, held_out, [entry.proposal for entry in entries])
    choices = [
        Choice(entry.method, entry.budget, entry.seed, entry.proposal, sums)
        for entry, sums in zip(entries, measured.sums, strict=True)
    ]
    if contest.repair:
        proposals = [entry.proposal for entry in entries]
        repaired = repaired_sums(context, proposals, calibration, held_out, tokens=REPAIR_TOKENS)
        choices = _after_repair(choices, repaired)
    energy = ENERGIES[contest.energy](gradients.A)
    judge = Judge(context.stack, energy, measured.base, measured.counts, brief.seed, held_out.domains)
    rows = [row for budget in budgets for row in judge.rows([c for c in choices if c.budget == budget])]
    return Comparison(
        base_loss=measured.base_loss,
        rows=tuple(rows),
        skipped=skipped,
        model=context.loaded.source,
        model_hash=context.identity,
        blocks=len(context.stack.blocks),
        parameters=sum(p.numel() for p in context.stack.model.parameters()),
        energy=contest.energy,
        calibration=calibration.describe(),
        search=calibration.first_tokens(contest.search_tokens).describe(),
        held_out=held_out.describe(),
        settings={
            "seed": brief.seed,
            "methods": list(contest.names()),
            "budgets": budgets,
            "random_draws": contest.random_draws,
            "search_tokens": contest.search_tokens,
            "protected": list(brief.protected),
            "repair": contest.repair,
        },
        provenance=provenance(),
    )


@dataclass(frozen=True)
class _Entry:
    """What one method proposes at one budget."""

    method: str
    budget: int
    seed: int
    proposal: Proposal


def _entries(
    context: Context, calibration: Samples, brief: Brief, budgets: Sequence[int], contest: Contest
) -> tuple[list[_Entry], dict[str, str]]:
    """What every method proposes, and why some could not."""
    entries: list[_Entry] = []
    skipped: dict[str, str] = {}
    for name in contest.names():
        samples = calibration.first_tokens(contest.search_tokens) if name in SEARCHING else calibration
        try:
            for seed in range(brief.seed, brief.seed + (contest.random_draws if name == RANDOM else 1)):
                proposed = propose_budgets(context, samples, name, replace(brief, seed=seed), budgets)
                entries += [_Entry(name, budget, seed, proposal) for budget, proposal in proposed.items()]
        # A rival that cannot treat this architecture must not cost the comparison of all others.
        except (ArchitectureError, InputError) as error:
            skipped[name] = str(error)
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
    if not entries:
        raise InputError("no method could be run: " + "; ".join(f"{n}: {why}" for n, why in skipped.items()))
    return entries, skipped


def _after_repair(choices: Sequence[Choice], repaired: Mapping[Removal, Floats]) -> list[Choice]:
    """Choices with their damage as it is after repair, where whole blocks are dropped and all draws were repaired."""
    after = [repaired.get(choice.proposal.removed) if choice.proposal.dropped else None for choice in choices]
    # A mean over repaired draws and others would say nothing of either.
    left_out = {(choice.method, choice.budget) for choice, sums in zip(choices, after, strict=True) if sums is None}
    return [
        choice
        if sums is None or (choice.method, choice.budget) in left_out
        else replace(choice, sums=sums, pruned=choice.sums)
        for choice, sums in zip(choices, after, strict=True)
    ]
