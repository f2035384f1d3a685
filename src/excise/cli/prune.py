"""`excise prune`: write the checkpoint without some blocks, and prove that it loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excise.cli.options import (
    AsJson,
    Device,
    Dtype,
    Force,
    Model,
    Portable,
    Seed,
    TokenLimit,
    TrustRemoteCode,
    indices,
)
from excise.errors import InputError

if TYPE_CHECKING:
    from excise.models.loading import Loaded
    from excise.repair.repair_stage import Removal, Repairs


def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, or a .gguf file.", show_default=False)],
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
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Refit one matrix below each cut in closed form, where that helps; on where --data is given.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Source of the samples to repair with (default starter).")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples to fit the repair on.")] = 64,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Samples kept apart to judge it by.")] = 16,
    tokens: TokenLimit = 256,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    portable: Portable = "",
    test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Load what was written; only what fits in memory.")
    ] = True,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Write a model without some of its blocks as a checkpoint that stock transformers loads.

    A folder is pruned on disk, whatever its size and quantisation; a .gguf file into a .gguf file, if --out is one.
    """
    if bool(removed or removed_sublayers) == (spectrum is not None):
        raise InputError(
            "expected either --removed 12-18,26 (or --removed-sublayers 3.attention, or both) or --spectrum FILE, "
            "got both or neither"
        )

    from excise.cli.terminal import output
    from excise.models.portable import readers_named
    from excise.provenance import provenance
    from excise.surgery.merge import RULES

    if merge and merge not in RULES:
        raise InputError(f"expected --merge in {', '.join(RULES)}, got '{merge}'")
    readers = readers_named(portable)
    proposed_by = "given" if spectrum is None else f"{spectrum.stem.removeprefix('spectrum-')}:{state}"
    names = [name for name in removed_sublayers.split(",") if name.strip()]
    blocks, names = (indices(removed, "--removed"), names) if spectrum is None else _of_state(spectrum, state)
    origin = provenance()
    card: dict[str, Any] = {
        "original": model,
        "proposed_by": proposed_by,
        "versions": origin["versions"],
        "command": origin["command"],
    }
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    drawing = _drawing(repair, data, samples, held_out, tokens, seed)
    if drawing and (merge or names or out.suffix == ".gguf"):
        raise InputError(
            "--repair makes up for whole blocks that are dropped, in a checkpoint folder; leave out --merge, "
            "sublayers and .gguf, or --repair and --data"
        )
    if out.suffix == ".gguf":
        if Path(model).suffix != ".gguf" or merge or names:
            raise InputError(
                f"a GGUF file is pruned from a GGUF file, whole blocks only and without --merge, got {model}; name a "
                f"folder with --out, and convert that with llama.cpp"
            )
        if set(readers) - {"llama.cpp"}:
            raise InputError(f"a GGUF file is for llama.cpp; expected no other reader in --portable, got {portable}")
        result = _from_gguf_to_gguf(model, blocks, out, test, force, options)
    elif Path(model).suffix != ".gguf" and not merge and not names and not drawing:
        result = _from_folder_to_folder(model, blocks, out, card, readers, test, force, options)
    else:
        result = _in_memory(model, blocks, names, out, card, readers, merge, drawing, test, force, options)
    result = {"out": str(out), **result}
    if as_json:
        typer.echo(json.dumps(result, default=str))
        return
    unit = "parameters" if "parameters" in result else "bytes"
    before, after = result[unit]["before"], result[unit]["after"]
    output.print(f"wrote {out}: {after:,} of {before:,} {unit} ({after / before:.1%})")
    for name, reason in result.get("left_out", {}).items():
        output.print(f"left out {name}: {reason}")
    _print_readers(result)
    _print_repair(result)
    if result.get("zeroed_sublayers"):
        output.print(
            f"{', '.join(result['zeroed_sublayers'])}: weights set to 0, which makes nothing smaller or faster"
        )
    if test:
        print_self_test(result["self_test"])


def _of_state(path: Path, state: int) -> tuple[tuple[int, ...], list[str]]:
    """Blocks and names of sublayers that a state of a spectrum removes."""
    from excise.ising.spectrum import Spectrum

    states = Spectrum.load(path)
    if state >= len(states):
        raise InputError(f"--state must be between 0 and {len(states) - 1}, got {state}")
    removed = states[state].removed
    return ((), [states.labels[i] for i in removed]) if states.labels else (removed, [])


def _from_gguf_to_gguf(
    model: str, blocks: Sequence[int], out: Path, test: bool, force: bool, options: dict[str, Any]
) -> dict[str, Any]:
    from excise.cli.terminal import status
    from excise.surgery.gguf import prune_gguf

    with status(f"writing {out}"):
        result = prune_gguf(model, blocks, out, overwrite=force)
    return {**result, **_tested(model, result["removed"], out, test, options)}


def _from_folder_to_folder(
    model: str,
    blocks: Sequence[int],
    out: Path,
    card: dict[str, Any],
    readers: Sequence[str],
    test: bool,
    force: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Without loading the model, whatever its size; a hub id's folder lies in the hub's cache."""
    from excise.cli.terminal import status
    from excise.models.loading import checkpoint_folder
    from excise.surgery.on_disk import prune_folder

    with status(f"writing {out}"):
        folder = checkpoint_folder(model)
        assert folder is not None  # no GGUF file
        recipe = prune_folder(folder, blocks, out, card=card, portable=readers, overwrite=force)
    return {**recipe, **_tested(str(folder), recipe["removed"], out, test, options)}


def _tested(model: str, removed: Sequence[int], out: Path, test: bool, options: dict[str, Any]) -> dict[str, Any]:
    if not test:
        return {}
    from excise.cli.terminal import status
    from excise.surgery.check import check_pruned

    with status("loading it"):
        return {"self_test": check_pruned(model, removed, out, **options)}


def _in_memory(
    model: str,
    blocks: Sequence[int],
    names: Sequence[str],
    out: Path,
    card: dict[str, Any],
    readers: Sequence[str],
    merge: str,
    drawing: dict[str, Any] | None,
    test: bool,
    force: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """For GGUF files written as safetensors, and what makes new weights: sublayers, merging, repair."""
    from dataclasses import asdict

    from excise.cli.terminal import load_model, status
    from excise.models.loading import checkpoint_folder
    from excise.repair.repair_stage import Repairs
    from excise.surgery.checkpoint import write_pruned
    from excise.surgery.destination import check_destination
    from excise.surgery.feasible import require_writable
    from excise.surgery.merge import merging, runs_of
    from excise.surgery.self_test import self_test
    from excise.surgery.sublayers import as_removal, named_sublayers

    check_destination(out, model, force)
    require_writable(checkpoint_folder(model), out, blocks, portable=readers, overwrite=force)
    loaded = load_model(model, **options)
    removal = as_removal(loaded.stack, blocks, named_sublayers(loaded.stack, names))
    blocks, gates = removal.blocks, removal.zeroed
    require_writable(loaded.folder, out, blocks, changes=loaded.stack.model, overwrite=force)
    if merge:
        card["merge"] = {"rule": merge, "runs": [asdict(run) for run in runs_of(blocks)]}
    repairs = _repaired(loaded, blocks, drawing, card) if drawing else Repairs()
    with merging(loaded.stack, blocks, merge or None), repairs.applied(loaded.stack, blocks):
        with status(f"writing {out}"):
            result = write_pruned(
                loaded.stack,
                blocks,
                out,
                source=loaded.folder,
                sublayers=gates,
                tokenizer=loaded.tokenizer,
                dtype=loaded.stored_dtype,
                card=card,
                portable=readers,
                overwrite=force,
            )
        if test:
            with status("loading it in a fresh process"):
                report = self_test(loaded.stack, blocks, out, sublayers=gates)
                result["self_test"] = {"level": "logits", **report}
    return result


def _drawing(
    repair: bool | None, data: str | None, samples: int, held_out: int, tokens: int, seed: int
) -> dict[str, Any] | None:
    """How to draw the samples to repair with; None where nothing is repaired."""
    if repair is False and data is not None:
        raise InputError("--data is read by --repair alone; leave out --no-repair or --data")
    if not repair and data is None:
        return None
    return {"data": data or "starter", "samples": samples, "held_out": held_out, "tokens": tokens, "seed": seed}


def _repaired(loaded: Loaded, blocks: Removal, drawing: dict[str, Any], card: dict[str, Any]) -> Repairs:
    """Fit the repair, and put what it brought on the card."""
    from excise.cli.terminal import tokens_progress
    from excise.data import split_samples
    from excise.errors import ArchitectureError
    from excise.repair.repair_stage import repair_removals

    source = drawing["data"]
    options = {name: value for name, value in drawing.items() if name != "data"}
    calibration, apart = split_samples(source, loaded.tokenizer, loss_on="content", **options)
    repairs = repair_removals(
        loaded, [blocks], calibration, apart, None, tokens=calibration.tokens, progress=tokens_progress
    )
    if blocks in repairs.refused:
        raise ArchitectureError(f"cannot repair this removal: {repairs.refused[blocks]}")
    fitted = repairs.fitted[blocks]
    assert fitted.losses is not None  # held-out samples were given
    card |= {"base_loss": fitted.losses.intact, "pruned_loss": fitted.losses.pruned, "seed": drawing["seed"]}
    if repairs.helpful(blocks):
        card |= {"repaired_loss": fitted.losses.repaired, "repair": fitted.describe()}
    else:
        card |= {"repair_left_out": fitted.describe()}
    return repairs


def _print_readers(result: dict[str, Any]) -> None:
    """Say for which readers every block is still what it was."""
    from excise.cli.terminal import output
    from excise.models.architectures.readers import READERS

    if "readers" not in result:  # a GGUF file, which is refused where llama.cpp would take it wrongly
        return
    titles = ", ".join(READERS[name].title for name in result["readers"]["right"])
    output.print(f"every block is taken for what it is by {titles}")
    for name, reason in result["readers"]["wrong"].items():
        output.print(f"WRONG in {READERS[name].title}: it {reason}")


def _print_repair(result: dict[str, Any]) -> None:
    from excise.cli.terminal import output

    kept = result.get("repair")
    facts = kept or result.get("repair_left_out")
    if facts is None:
        return
    losses, said = facts["losses"], "repaired in closed form" if kept else "repair does not help and is left out"
    output.print(
        f"{said}: Δ loss {losses['delta_before']:+.3f} → {losses['delta_after']:+.3f} nats/token on "
        f"{facts['held_out']['samples']} held-out samples"
    )


def print_self_test(report: dict[str, Any]) -> None:
    """Print what the self-test found in one line."""
    from excise.cli.terminal import output

    level = report.get("level", "logits")
    if level == "none":
        output.print(f"no self-test: {report['reason']}")
        return
    loads = {
        True: "loads in stock transformers",
        False: "does NOT load cleanly",
        None: "dequantised by excise, since stock transformers would not read its scales",
    }[report["loads_in_stock_transformers"]]
    if level == "names":
        found = "all are there" if report["names_agree"] else "they do NOT agree with the model"
        output.print(f"self-test: {loads}; weights compared by name and shape only, {found} ({report['reason']})")
        return
    cache = "agrees" if report["cache_agrees"] else "does NOT agree"
    if report.get("original_cache_agrees") is False:
        cache += ", nor does the original's"
    output.print(
        f"self-test: {loads}; logits differ from the gated original by at most "
        f"{report['max_abs_logit_difference']:.3g}; generation with and without KV cache {cache}"
    )
