"""`excise prune`: write the checkpoint without some blocks, and prove that it loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import MADE_BY, json_text
from excise.errors import InputError
from excise.plain import Facts, Values
from excise.settings import Loading, Porting, Printing, Replacing, Sampling, changed, indices, names, names_in, option
from excise.team import team

if TYPE_CHECKING:
    from excise.models.loading import Loaded
    from excise.repair.several import Removal, Repairs
    from excise.surgery.publish import Test


@dataclass(frozen=True, kw_only=True)
class PruneSettings(Replacing, Printing, Porting, Loading):
    """Settings of `excise prune`."""

    divides = "passes"

    out: Path = option(..., "Folder for the checkpoint, or a .gguf file.", group="Output", writes="folder")
    removed: tuple[int, ...] = option((), "Blocks to remove, such as 12-18,26.", group="What to remove", parse=indices)
    removed_sublayers: tuple[str, ...] = option(
        (),
        "Sublayers to remove, such as 3.attention,5.feed-forward: set to 0, so no smaller or faster.",
        group="What to remove",
        parse=names,
    )
    spectrum: Path | None = option(None, "Or a spectrum of `excise solve`, …", group="What to remove", reads="path")
    state: int = option(0, "… and which of its states (0: the ground state).", group="What to remove", least=0)
    merge: str = option(
        "",
        "Merge each run of removed blocks into the block kept, by rule figure or code.",
        choices=names_in("excise.surgery.merge:RULES"),
    )
    repair: bool | None = option(
        None, "Refit a matrix below and one above each cut in closed form, where that helps; on where --data is given."
    )
    data: str | None = option(
        None, "Source of the samples to repair with (default starter).", group="Data", reads="data"
    )
    samples: int = changed(Sampling, "samples", default=64, help="Samples to fit the repair on.", least=2)
    held_out: int = option(16, "Samples kept apart to judge it by.", group="Data", least=1)
    tokens: int = changed(Sampling, "tokens", default=256)
    seed: int = changed(Sampling, "seed")
    test: bool = option(True, "Load what was written; only what fits in memory.", flag="--self-test", group="Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.removed or self.removed_sublayers) == (self.spectrum is not None):
            raise InputError(
                "expected either --removed 12-18,26 (or --removed-sublayers 3.attention, or both) or --spectrum FILE, "
                "got both or neither"
            )
        if self.repair is False and self.data is not None:
            raise InputError("--data is read by --repair alone; leave out --no-repair or --data")

    @property
    def repairs(self) -> bool:
        """Whether a repair is fitted."""
        return bool(self.repair) or self.data is not None


def prune(settings: PruneSettings) -> None:
    """Write a model without some of its blocks as a checkpoint that stock transformers loads.

    A folder is pruned on disk, whatever its size and quantisation; a .gguf file into a .gguf file, if --out is one.
    """
    from excise.cli.terminal import output

    blocks, sublayers = settings.removed, settings.removed_sublayers
    if settings.spectrum is not None:
        blocks, sublayers = _of_state(settings.spectrum, settings.state)
    _check_together(settings, sublayers)
    in_memory = settings.merge or sublayers or settings.repairs
    if settings.out.suffix == ".gguf":
        result = team().once(lambda: _from_gguf_to_gguf(settings, blocks))
    elif Path(settings.model).suffix != ".gguf" and not in_memory:
        result = team().once(lambda: _from_folder_to_folder(settings, blocks))
    else:
        result = _in_memory(settings, blocks, sublayers)
    result = {"out": str(settings.out), **result}
    if settings.as_json:
        typer.echo(json_text(result))
        return
    unit = "parameters" if "parameters" in result else "bytes"
    before, after = result[unit]["before"], result[unit]["after"]
    of, share = ("", "") if before is None else (f" of {before:,}", f" ({after / before:.1%})")
    output.print(f"wrote {settings.out}: {after:,}{of} {unit}{share}")
    for name, reason in result.get("left_out", {}).items():
        output.print(f"left out {name}: {reason}")
    _print_readers(result)
    _print_repair(result)
    if result.get("zeroed_sublayers"):
        output.print(
            f"{', '.join(result['zeroed_sublayers'])}: weights set to 0, which makes nothing smaller or faster"
        )
    print_self_test(result.get("self_test"))


def _check_together(settings: PruneSettings, sublayers: Sequence[str]) -> None:
    """Refuse what does not go together with the sublayers that are removed, which a spectrum may have named."""
    gguf = settings.out.suffix == ".gguf"
    if settings.repairs and (settings.merge or sublayers or gguf):
        raise InputError(
            "--repair makes up for whole blocks that are dropped, in a checkpoint folder; leave out --merge, "
            "sublayers and .gguf, or --repair and --data"
        )
    if gguf and (Path(settings.model).suffix != ".gguf" or settings.merge or sublayers):
        raise InputError(
            f"a GGUF file is pruned from a GGUF file, whole blocks only and without --merge, got {settings.model}; "
            f"name a folder with --out, and convert that with llama.cpp"
        )
    if gguf and set(settings.portable) - {"llama.cpp"}:
        others = ", ".join(settings.portable)
        raise InputError(f"a GGUF file is for llama.cpp; expected no other reader in --portable, got {others}")


def _card(settings: PruneSettings) -> Facts:
    from excise.artefacts.provenance import provenance
    from excise.job import made_by

    origin, spectrum = provenance(), settings.spectrum
    return {
        MADE_BY: made_by(settings),
        "original": settings.model,
        "proposed_by": "given" if spectrum is None else f"{spectrum.stem.removeprefix('spectrum-')}:{settings.state}",
        "versions": origin["versions"],
        "command": origin["command"],
    }


def _of_state(path: Path, state: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Blocks and names of sublayers that a state of a spectrum removes."""
    from excise.ising.spectrum import Spectrum

    states = Spectrum.load(path)
    if state >= len(states):
        raise InputError(f"--state must be between 0 and {len(states) - 1}, got {state}")
    removed = states[state].removed
    return ((), tuple(states.labels[i] for i in removed)) if states.labels else (removed, ())


def _from_gguf_to_gguf(settings: PruneSettings, blocks: Sequence[int]) -> Facts:
    from excise.cli.terminal import status
    from excise.job import made_by
    from excise.surgery.gguf import prune_gguf

    test = _test(settings, blocks)
    with status(f"writing and testing {settings.out}"):
        return prune_gguf(
            settings.model, blocks, settings.out, overwrite=settings.force, test=test, made_by=made_by(settings)
        )


def _from_folder_to_folder(settings: PruneSettings, blocks: Sequence[int]) -> Facts:
    """Without loading the model, whatever its size; a hub id's folder lies in the hub's cache."""
    from excise.cli.terminal import status
    from excise.models.loading import checkpoint_folder
    from excise.surgery.feasible import require_writable
    from excise.surgery.on_disk import prune_folder

    folder = checkpoint_folder(settings.model)
    assert folder is not None  # no GGUF file
    require_writable(folder, settings.out, blocks, portable=settings.portable, overwrite=settings.force)
    test = _test(settings, blocks, folder)
    with status(f"writing and testing {settings.out}"):
        return prune_folder(folder, blocks, settings.out, card=_card(settings), overwrite=settings.force, test=test)


def _test(settings: PruneSettings, removed: Sequence[int], folder: Path | None = None) -> Test | None:
    """What tests a checkpoint that was written without loading the original; None where no test is wanted."""
    if not settings.test:
        return None
    from excise.surgery.check import check_pruned

    return lambda place: check_pruned(str(folder or settings.model), removed, place, **settings.loading())


def _in_memory(settings: PruneSettings, blocks: Sequence[int], sublayers: Sequence[str]) -> Facts:
    """For GGUF files written as safetensors, and what makes new weights: sublayers, merging, repair."""
    from dataclasses import asdict
    from functools import partial

    from excise.cli.terminal import load_model, status
    from excise.models.loading import checkpoint_folder
    from excise.models.portable import require_portable
    from excise.repair.several import Repairs
    from excise.surgery.check import check_loaded
    from excise.surgery.checkpoint import write_pruned
    from excise.surgery.feasible import require_writable
    from excise.surgery.merge import merging, runs_of
    from excise.surgery.sublayers import as_removal, named_sublayers

    out, merge, card = settings.out, settings.merge, _card(settings)
    original = checkpoint_folder(settings.model)
    require_writable(original, out, blocks, portable=settings.portable, overwrite=settings.force)
    loaded = load_model(settings.model, **settings.loading(), reading=settings.repairs)
    removal = as_removal(loaded.stack, blocks, named_sublayers(loaded.stack, sublayers))
    blocks, gates = removal.blocks, removal.zeroed
    # Asked again: a GGUF file has no config to ask before it is loaded, and a block that loses all its sublayers goes.
    require_portable(loaded.stack.architecture, loaded.stack.model.config, blocks, settings.portable, loaded.raw_config)
    require_writable(loaded.folder, out, blocks, changes=loaded.stack.model, overwrite=settings.force)
    if merge:
        card["merge"] = {"rule": merge, "runs": [asdict(run) for run in runs_of(blocks)]}
    repairs = _repaired(loaded, blocks, settings, card) if settings.repairs else Repairs()
    stack = loaded.stack
    facts: Facts = {"source": loaded.folder, "sublayers": gates, "stored": loaded.stored_dtype}
    test = partial(check_loaded, stack, blocks, **facts) if settings.test else None
    showing = status(f"writing and testing {out}")
    write = partial(
        write_pruned,
        stack,
        blocks,
        out,
        source=loaded.folder,
        sublayers=gates,
        tokenizer=loaded.tokenizer,
        dtype=loaded.stored_dtype,
        card=card,
        overwrite=settings.force,
        requantise=settings.repairs,
        test=test,
    )
    with merging(stack, blocks, merge or None), repairs.applied(stack, blocks), showing:
        return team().once(write)


def _repaired(loaded: Loaded, blocks: Removal, settings: PruneSettings, card: Facts) -> Repairs:
    """Fit the repair, and put what it brought on the card."""
    from excise.cli.terminal import tokens_progress
    from excise.context import Context
    from excise.data import Fit, own_answers, split_samples
    from excise.errors import ArchitectureError
    from excise.progress import Progress
    from excise.repair.several import repair_removals

    calibration, apart = split_samples(
        settings.data or "starter",
        loaded.tokenizer,
        samples=settings.samples,
        held_out=settings.held_out,
        tokens=settings.tokens,
        seed=settings.seed,
        loss_on="content",
        fit=Fit.of(loaded.stack),
        own=own_answers(loaded),
    )
    context = Context(loaded, progress=Progress(tokens_progress))
    repairs = repair_removals(context, [blocks], calibration, apart, tokens=calibration.tokens)
    if blocks in repairs.refused:
        raise ArchitectureError(f"cannot repair this removal: {repairs.refused[blocks]}")
    fitted = repairs.fitted[blocks]
    assert fitted.losses is not None  # held-out samples were given
    card |= {"base_loss": fitted.losses.intact, "pruned_loss": fitted.losses.pruned, "seed": settings.seed}
    if repairs.helpful(blocks):
        card |= {"repaired_loss": fitted.losses.repaired, "repair": fitted.describe()}
    else:
        card |= {"repair_left_out": fitted.describe()}
    return repairs


def _print_readers(result: Facts) -> None:
    """Say for which readers every block is still what it was."""
    from excise.cli.terminal import output
    from excise.models.architectures.readers import READERS

    if "readers" not in result:  # a GGUF file, which is refused where llama.cpp would take it wrongly
        return
    titles = ", ".join(READERS[name].title for name in result["readers"]["right"])
    output.print(f"every block is taken for what it is by {titles}")
    for name, reason in result["readers"]["wrong"].items():
        output.print(f"WRONG in {READERS[name].title}: it {reason}")


def _print_repair(result: Facts) -> None:
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


def print_self_test(report: Values | None) -> None:
    """Print what the self-test found in one line; None where there was none."""
    from excise.cli.terminal import output
    from excise.surgery.proof import in_words

    output.print("not tested" if report is None else f"self-test: {in_words(report)}", markup=False, soft_wrap=True)
