"""`excise verify`: measured damage of candidate removals on held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from excise.artefacts import json_text, write_artefact
from excise.errors import InputError
from excise.settings import Batching, Loading, Printing, Replacing, Sampling, changed, indices, names_in, option


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Replacing, Printing, Batching, Sampling, Loading):
    """Settings of `excise verify`."""

    divides = "passes"

    gradients: Path | None = option(None, "Gradients whose energy is shown beside the measured loss.", reads="path")
    energy: str = option(
        "fisher", "Energy built from them: fisher or fisher+linear.", choices=names_in("excise.ising.energies:ENERGIES")
    )
    spectrum: tuple[Path, ...] = option(
        (), "Spectrum of `excise solve` whose states are measured; repeatable.", group="What to remove", reads="path"
    )
    lowest: int = option(4, "How many of each spectrum's states.", group="What to remove", least=1)
    removed: tuple[str, ...] = option((), "A removal to measure, such as 12-18,26; repeatable.", group="What to remove")
    samples: int = changed(Sampling, "samples", default=32)
    seed: int = changed(Sampling, "seed", default=1, help="Seed of the draw; take another than for the gradients.")
    out: Path = option(Path("verified.json"), "File for the result (JSON).", group="Output", writes="file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.spectrum and not self.removed:
            raise InputError("nothing to verify: give --spectrum FILE or --removed 3,4")
        for text in self.removed:
            indices(text, "--removed")


def verify(settings: VerifySettings) -> None:
    """Measure the loss of candidate removals, sharing the computation of the blocks that they keep in common."""
    out = settings.out
    from excise.artefacts.provenance import provenance
    from excise.choosing.proposal import Proposal
    from excise.choosing.verify import verify as verify_proposals
    from excise.cli.terminal import load_model, output, tokens_progress
    from excise.context import Context
    from excise.data import Fit, load_samples, own_answers
    from excise.ising.energies import ENERGIES, Energy
    from excise.ising.gradients import Gradients
    from excise.ising.spectrum import Spectrum
    from excise.job import made_by
    from excise.models.stack import block_indices
    from excise.progress import Progress
    from excise.report.tables import candidates_table
    from excise.store import Store

    proposals: list[tuple[str, tuple[int, ...]]] = []
    for path in settings.spectrum:
        states = Spectrum.load(path).states[: settings.lowest]
        proposals += [(f"{path.stem.removeprefix('spectrum-')}:{k}", s.removed) for k, s in enumerate(states)]
    proposals += [(f"given:{text}", indices(text, "--removed")) for text in settings.removed]

    loaded = load_model(settings.model, **settings.loading())
    n = len(loaded.stack.blocks)
    shown = Energy(None, [[0.0] * n] * n)
    if settings.gradients is not None:
        shown = ENERGIES[settings.energy](Gradients.load(settings.gradients).blocks())
    if len(shown) != n:
        raise InputError(f"the gradients are of a model with {len(shown)} blocks, {settings.model} has {n}")
    drawn = load_samples(
        settings.data, loaded.tokenizer, fit=Fit.of(loaded.stack), own=own_answers(loaded), **settings.drawing()
    )
    store = Store(out.with_name(f".{out.name}.work"))
    context = Context(loaded, store, Progress(tokens_progress), settings.batch_tokens)
    asked = [Proposal(method, block_indices(loaded.stack, removed)) for method, removed in proposals]
    verified = verify_proposals(context, drawn, asked, shown)
    facts = {"model": settings.model, "held_out": drawn.describe(), **verified.to_json(), "provenance": provenance()}
    write_artefact(out, facts, key=made_by(settings))
    context.finish()
    if settings.as_json:
        typer.echo(json_text(facts))
        return
    total = sum(p.numel() for p in loaded.stack.model.parameters())
    output.print(candidates_table(verified, verified.best, total))
    output.print(f"intact: {verified.base_loss:.4f} nats/token")
