"""`excise verify`: measured damage of candidate removals on held-out samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excise.artefacts import json_text, write_json
from excise.cli.options import (
    AsJson,
    BatchTokens,
    Data,
    Device,
    Dtype,
    Force,
    LossOn,
    Model,
    SampleCount,
    TokenLimit,
    TrustRemoteCode,
    check_new,
    indices,
)
from excise.errors import InputError


def verify(
    model: Model,
    gradients: Annotated[
        Path | None, typer.Option(help="Gradients whose energy is shown beside the measured loss.")
    ] = None,
    energy: Annotated[str, typer.Option(help="Energy built from them: fisher or fisher+linear.")] = "fisher",
    spectrum: Annotated[
        list[Path] | None, typer.Option(help="Spectrum of `excise solve` whose states are measured; repeatable.")
    ] = None,
    lowest: Annotated[int, typer.Option(min=1, help="How many of each spectrum's states.")] = 4,
    removed: Annotated[
        list[str] | None, typer.Option(help="A removal to measure, such as 12-18,26; repeatable.")
    ] = None,
    data: Data = "starter",
    samples: SampleCount = 32,
    tokens: TokenLimit = 512,
    seed: Annotated[int, typer.Option(help="Seed of the draw; take another than for the gradients.")] = 1,
    loss_on: LossOn = "content",
    out: Annotated[Path, typer.Option(help="File for the result (JSON).")] = Path("verified.json"),
    batch_tokens: BatchTokens = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Measure the loss of candidate removals, sharing the computation of the blocks that they keep in common."""
    check_new(out, force)
    if not spectrum and not removed:
        raise InputError("nothing to verify: give --spectrum FILE or --removed 3,4")

    import shutil

    from excise.choosing.verify import verify as verify_proposals
    from excise.cli.terminal import load_model, output, tokens_progress
    from excise.data import load_samples
    from excise.ising.energies import ENERGIES, Energy
    from excise.ising.gradients import Gradients
    from excise.ising.spectrum import Spectrum
    from excise.provenance import provenance
    from excise.report.tables import candidates_table

    if energy not in ENERGIES:
        raise InputError(f"expected --energy in {', '.join(ENERGIES)}, got '{energy}'")
    proposals: list[tuple[str, tuple[int, ...]]] = []
    for path in spectrum or ():
        states = Spectrum.load(path).states[:lowest]
        proposals += [(f"{path.stem.removeprefix('spectrum-')}:{k}", s.removed) for k, s in enumerate(states)]
    proposals += [(f"given:{text}", indices(text, "--removed")) for text in removed or ()]

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    n = len(loaded.stack.blocks)
    shown = ENERGIES[energy](Gradients.load(gradients).blocks()) if gradients else Energy(None, [[0.0] * n] * n)
    if len(shown) != n:
        raise InputError(f"the gradients are of a model with {len(shown)} blocks, {model} has {n}")
    drawn = load_samples(data, loaded.tokenizer, samples=samples, tokens=tokens, seed=seed, loss_on=loss_on)
    ledger = out.with_name(f".{out.name}.work")
    with tokens_progress("verify", drawn.tokens * (len({r for _, r in proposals}) + 1)) as advance:
        verified = verify_proposals(
            loaded.stack, drawn, proposals, shown, batch_tokens=batch_tokens, ledger=ledger, advance=advance
        )
    facts = {"model": model, "held_out": drawn.describe(), **verified.to_json(), "provenance": provenance()}
    write_json(out, facts)
    shutil.rmtree(ledger, ignore_errors=True)
    if as_json:
        typer.echo(json_text(facts))
        return
    total = sum(p.numel() for p in loaded.stack.model.parameters())
    output.print(candidates_table(verified, verified.best, total))
    output.print(f"intact: {verified.base_loss:.4f} nats/token")
