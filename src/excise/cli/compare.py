"""`excise compare`: every criterion on one model, with intervals and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excise.artefacts import atomic_path, json_text
from excise.cli.options import (
    AsJson,
    BatchTokens,
    Data,
    Device,
    Dtype,
    LossOn,
    Model,
    Protect,
    SampleCount,
    Seed,
    TokenLimit,
    TrustRemoteCode,
    budgets,
    indices,
)


def compare(
    model: Model,
    remove: Annotated[str, typer.Option(help="Numbers M of blocks to remove, such as 4,8,12 or 3..8.")],
    out: Annotated[Path, typer.Option(help="Folder for everything; run again to go on or to add methods.")],
    methods: Annotated[
        str, typer.Option(help="all (but the costly published EvoPress schedule), or names separated by commas.")
    ] = "all",
    data: Data = "starter",
    samples: SampleCount = 128,
    tokens: TokenLimit = 512,
    search_tokens: Annotated[
        int,
        typer.Option(min=1, help="Calibration tokens for criteria that measure many candidates."),
    ] = 2048,
    held_out_data: Annotated[
        str | None, typer.Option("--eval", help="Source of the held-out text, if not --data itself.")
    ] = None,
    held_out: Annotated[int, typer.Option("--eval-samples", min=2, help="Held-out samples.")] = 32,
    held_out_tokens: Annotated[
        int | None, typer.Option("--eval-tokens", min=2, help="Longest of those, if not --tokens.")
    ] = None,
    random_draws: Annotated[int, typer.Option("--random", min=1, help="Draws of the method random.")] = 5,
    energy: Annotated[str, typer.Option(help="Energy shown beside the damage: fisher or fisher+linear.")] = "fisher",
    repair: Annotated[
        bool, typer.Option("--repair", help="Also repair every choice in closed form, and show Δ loss after it.")
    ] = False,
    protect: Protect = "",
    seed: Seed = 0,
    loss_on: LossOn = "content",
    batch_tokens: BatchTokens = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Let every criterion choose M blocks on the same samples, and measure all choices on the same held-out text."""
    wanted, protected = budgets(remove), indices(protect, "--protect")

    from excise.choosing.compare import check_energy, method_names
    from excise.choosing.compare import compare as compare_methods
    from excise.cli.terminal import load_model, output, tokens_progress
    from excise.data import split_samples
    from excise.report.comparison import comparison_markdown, comparison_tables, write_comparison_figures

    names = method_names(methods)
    check_energy(energy)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    calibration, apart = split_samples(
        data,
        loaded.tokenizer,
        samples=samples,
        held_out=held_out,
        held_out_data=held_out_data,
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        seed=seed,
        loss_on=loss_on,
    )
    comparison = compare_methods(
        loaded,
        calibration,
        apart,
        wanted,
        out,
        methods=names,
        search_tokens=search_tokens,
        random_draws=random_draws,
        energy=energy,
        protected=protected,
        seed=seed,
        repair=repair,
        batch_tokens=batch_tokens,
        progress=tokens_progress,
    )
    write_comparison_figures(comparison, out / "figures")
    with atomic_path(out / "compare.md") as temporary:
        temporary.write_text(comparison_markdown(comparison), encoding="utf-8")
    if as_json:
        typer.echo(json_text(comparison.to_json()))
        return
    for table in comparison_tables(comparison):
        output.print(table)
    output.print(
        f"intact: {comparison.base_loss:.4f} nats/token on {len(apart)} held-out samples; ● lowest, ○ not "
        f"distinguishable from it (paired bootstrap)\n{out / 'compare.json'}   {out / 'compare.md'}   {out / 'figures'}"
    )
