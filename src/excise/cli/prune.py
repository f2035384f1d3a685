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
    removed_sublayers: Annotated[
        str,
        typer.Option(
            help="Sublayers to remove, such as 3.attention,5.feed-forward: set to 0, so no smaller or faster."
        ),
    ] = "",
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
    if bool(removed or removed_sublayers) == (spectrum is not None):
        raise InputError(
            "expected either --removed 12-18,26 (or --removed-sublayers 3.attention, or both) or --spectrum FILE, "
            "got both or neither"
        )

    from dataclasses import asdict

    from excise.cli.terminal import load_model, output, status
    from excise.provenance import provenance
    from excise.surgery.checkpoint import write_pruned
    from excise.surgery.merge import RULES, merging, runs_of
    from excise.surgery.self_test import self_test
    from excise.surgery.sublayers import as_removal, named_sublayers

    if merge and merge not in RULES:
        raise InputError(f"expected --merge in {', '.join(RULES)}, got '{merge}'")

    proposed_by = "given" if spectrum is None else f"{spectrum.stem.removeprefix('spectrum-')}:{state}"
    names = [name for name in removed_sublayers.split(",") if name.strip()]
    wanted = (indices(removed, "--removed"), names) if spectrum is None else _of_state(spectrum, state)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    origin = provenance()
    card: dict[str, Any] = {
        "original": model,
        "proposed_by": proposed_by,
        "versions": origin["versions"],
        "command": origin["command"],
    }
    removal = as_removal(loaded.stack, wanted[0], named_sublayers(loaded.stack, wanted[1]))
    blocks, gates = removal.blocks, removal.zeroed
    if merge:
        card["merge"] = {"rule": merge, "runs": [asdict(run) for run in runs_of(blocks)]}
    with merging(loaded.stack, blocks, merge or None):
        with status(f"writing {out}"):
            recipe = write_pruned(
                loaded.stack,
                blocks,
                out,
                sublayers=gates,
                tokenizer=loaded.tokenizer,
                dtype=loaded.stored_dtype,
                card=card,
                overwrite=force,
            )
        result = {"out": str(out), **recipe}
        if test:
            with status("loading it in a fresh process"):
                result["self_test"] = self_test(loaded.stack, blocks, out, sublayers=gates)
    if as_json:
        typer.echo(json.dumps(result, default=str))
        return
    before, after = recipe["parameters"]["before"], recipe["parameters"]["after"]
    output.print(f"wrote {out}: {after:,} of {before:,} parameters ({after / before:.1%})")
    if gates:
        output.print(
            f"{', '.join(recipe['zeroed_sublayers'])}: weights set to 0, which makes nothing smaller or faster"
        )
    if test:
        print_self_test(result["self_test"])


def _of_state(path: Path, state: int) -> tuple[tuple[int, ...], list[str]]:
    """Blocks and names of sublayers that a state of a spectrum removes."""
    from excise.spectrum import Spectrum

    states = Spectrum.load(path)
    if state >= len(states):
        raise InputError(f"--state must be between 0 and {len(states) - 1}, got {state}")
    removed = states[state].removed
    return ((), [states.labels[i] for i in removed]) if states.labels else (removed, [])


def print_self_test(report: dict[str, Any]) -> None:
    """Print what the self-test found in one line."""
    from excise.cli.terminal import output

    loads = "loads in stock transformers" if report["loads_in_stock_transformers"] else "does NOT load cleanly"
    cache = "agrees" if report["cache_agrees"] else "does NOT agree"
    if report.get("original_cache_agrees") is False:
        cache += ", nor does the original's"
    output.print(
        f"self-test: {loads}; logits differ from the gated original by at most "
        f"{report['max_abs_logit_difference']:.3g}; generation with and without KV cache {cache}"
    )
