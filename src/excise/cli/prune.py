"""`excise prune`: write the checkpoint without some blocks, and prove that it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from excise.cli.options import AsJson, Device, Dtype, Force, Model, TrustRemoteCode, indices
from excise.errors import InputError


def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.", show_default=False)],
    removed: Annotated[str, typer.Option(help="Blocks to remove, such as 12-18,26.")] = "",
    spectrum: Annotated[Path | None, typer.Option(help="Or a spectrum of `excise solve`, …")] = None,
    state: Annotated[int, typer.Option(min=0, help="… and which of its states (0: the ground state).")] = 0,
    merge: Annotated[
        str, typer.Option(help="Merge each run of removed blocks into the block kept, by rule figure or code.")
    ] = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    test: Annotated[bool, typer.Option("--self-test/--no-self-test", help="Load it in a fresh process.")] = True,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Write a model without some of its blocks as a checkpoint that stock transformers loads."""
    if bool(removed) == (spectrum is not None):
        raise InputError("expected either --removed 12-18,26 or --spectrum FILE, got both or neither")

    from dataclasses import asdict

    from excise.cli.terminal import load_model, output, status
    from excise.models.stack import block_indices
    from excise.provenance import provenance
    from excise.spectrum import Spectrum
    from excise.surgery.checkpoint import write_pruned
    from excise.surgery.merge import RULES, merging, runs_of
    from excise.surgery.self_test import self_test

    if merge and merge not in RULES:
        raise InputError(f"expected --merge in {', '.join(RULES)}, got '{merge}'")

    if spectrum is not None:
        states = Spectrum.load(spectrum)
        if state >= len(states):
            raise InputError(f"--state must be between 0 and {len(states) - 1}, got {state}")
        blocks, proposed_by = states[state].removed, f"{spectrum.stem.removeprefix('spectrum-')}:{state}"
    else:
        blocks, proposed_by = indices(removed, "--removed"), "given"
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    origin = provenance()
    card: dict[str, Any] = {
        "original": model,
        "proposed_by": proposed_by,
        "versions": origin["versions"],
        "command": origin["command"],
    }
    blocks = block_indices(loaded.stack, blocks)
    if merge:
        card["merge"] = {"rule": merge, "runs": [asdict(run) for run in runs_of(blocks)]}
    with merging(loaded.stack, blocks, merge or None):
        with status(f"writing {out}"):
            recipe = write_pruned(
                loaded.stack,
                blocks,
                out,
                tokenizer=loaded.tokenizer,
                dtype=loaded.stored_dtype,
                card=card,
                overwrite=force,
            )
        result = {"out": str(out), **recipe}
        if test:
            with status("loading it in a fresh process"):
                result["self_test"] = self_test(loaded.stack, blocks, out)
    if as_json:
        typer.echo(json.dumps(result, default=str))
        return
    before, after = recipe["parameters"]["before"], recipe["parameters"]["after"]
    output.print(f"wrote {out}: {after:,} of {before:,} parameters ({after / before:.1%})")
    if test:
        print_self_test(result["self_test"])


def print_self_test(report: dict[str, Any]) -> None:
    """Print what the self-test found in one line."""
    from excise.cli.terminal import output

    loads = "loads in stock transformers" if report["loads_in_stock_transformers"] else "does NOT load cleanly"
    cache = "agrees" if report["cache_agrees"] else "does NOT agree"
    output.print(
        f"self-test: {loads}; logits differ from the gated original by at most "
        f"{report['max_abs_logit_difference']:.3g}; generation with and without KV cache {cache}"
    )
