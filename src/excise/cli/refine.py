"""`excise refine`: measured damage, an energy fitted to it, its lowest states measured, and so on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from excise.artefacts import json_text, write_json
from excise.cli.options import (
    AsJson,
    Data,
    Device,
    Domains,
    Dtype,
    Effort,
    ForceBlocks,
    LossOn,
    Model,
    ObjectiveText,
    Protect,
    Questions,
    SampleCount,
    Seed,
    TokenLimit,
    TrustRemoteCode,
    budgets,
    indices,
)
from excise.errors import InputError

if TYPE_CHECKING:
    from excise.choosing.refine import Refined


def refine(
    model: Model,
    remove: Annotated[str, typer.Option(help="Numbers M of blocks to remove, such as 8 or 4,8,12.")],
    out: Annotated[Path, typer.Option(help="Folder for candidates, energies and every measurement, which is reused.")],
    data: Data = "starter",
    samples: SampleCount = 128,
    tokens: TokenLimit = 512,
    objective: ObjectiveText = "kl",
    questions: Questions = None,
    domains: Domains = "mean",
    effort: Effort = 4.0,
    protect: Protect = "",
    force_blocks: ForceBlocks = "",
    seed: Seed = 0,
    loss_on: LossOn = "content",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Find removals of little measured damage; further budgets and runs reuse what is measured."""
    wanted, protected, forced = budgets(remove), indices(protect, "--protect"), indices(force_blocks, "--force-blocks")
    if effort <= 0:
        raise InputError(f"--effort must be above 0, got {effort}")

    from excise.choosing.refine import no_energy, plan, refinement_facts
    from excise.choosing.refine import refine as refine_budget
    from excise.cli.terminal import announce_cost, load_model, output, tokens_progress
    from excise.data import load_samples
    from excise.measuring.objectives import load_objective
    from excise.models.identity import model_identity
    from excise.models.removable import block_problem
    from excise.models.stack import block_indices
    from excise.report.refinement import finalists_table, trust_line, write_refinement_figures

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    stack = loaded.stack
    protected, forced = block_indices(stack, protected), block_indices(stack, forced)
    drawn = load_samples(data, loaded.tokenizer, samples=samples, tokens=tokens, seed=seed, loss_on=loss_on)
    damage = load_objective(objective, drawn, loaded.tokenizer, questions=questions, domains=domains, seed=seed)
    spend = effort * drawn.tokens
    announce_cost(stack, drawn, spend * len(wanted))
    found: dict[int, Refined] = {}
    for budget in sorted(wanted, reverse=True):
        units = len(block_problem(stack, no_energy(len(stack.blocks)), budget, protected, forced).free)
        with tokens_progress(f"refine, M = {budget}", plan(units, budget, spend).measurements(units)) as advance:
            found[budget] = refine_budget(
                stack,
                damage,
                budget,
                tokens=spend,
                protected=protected,
                forced=forced,
                seed=seed,
                work=out / "work",
                advance=advance,
            )
        found[budget].energy().save(out / f"energy-{budget}.safetensors")
        found[budget].search.spectrum.save(out / f"spectrum-fitted-{budget}.json")
        write_refinement_figures(found[budget], budget, out / "figures")
    settings = {"seed": seed, "domains": domains, "protected": list(protected), "forced": list(forced)}
    facts = {
        "model": model,
        "model_hash": model_identity(stack.model),
        "settings": settings,
        **refinement_facts(found, damage, effort, drawn),
    }
    write_json(out / "candidates.json", facts)
    if as_json:
        typer.echo(json_text(facts))
        return
    for budget, result in sorted(found.items()):
        output.print(finalists_table(result, budget, damage.name))
        output.print(trust_line(result))
    output.print(f"{out / 'candidates.json'}   {out / 'figures'}")
