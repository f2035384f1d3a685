"""Repair inside a run: the removals that measured best are repaired, and measured again as repaired."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from excise.artefacts import read_json
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.models.stack import Stack
from excise.progress import Progress, silent
from excise.repair.cuts import cuts_of
from excise.repair.refitted import Repair
from excise.repair.repair import repair_each, repaired, require_repairable
from excise.surgery.checkpoint import write_pruned
from excise.surgery.on_disk import prune_folder
from excise.surgery.publish import Test

REPAIRED = 3
TOKENS = 4096

Removal = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Repairs:
    """Repairs of several removals.

    Attributes:
        fitted: removal → its repair, with its losses on held-out samples.
        refused: removal → why it cannot be repaired.

    """

    fitted: Mapping[Removal, Repair] = field(default_factory=dict)
    refused: Mapping[Removal, str] = field(default_factory=dict)

    def loss(self, removed: Removal) -> float | None:
        """Loss of a repaired removal on the held-out samples, nats per token; None where it was not repaired."""
        fitted = self.fitted.get(removed)
        return fitted.losses.repaired if fitted and fitted.losses else None

    def helpful(self, removed: Removal) -> Repair | None:
        """The repair of a removal, where there is one and it lowers the loss on the held-out samples."""
        fitted = self.fitted.get(removed)
        return fitted if fitted and fitted.losses and fitted.losses.repaired < fitted.losses.pruned else None

    def applied(self, stack: Stack, removed: Removal) -> AbstractContextManager[Any]:
        """Context in which the model has the weights of the removal's helpful repair; without one nothing happens."""
        helpful = self.helpful(removed)
        return repaired(stack, helpful) if helpful else contextlib.nullcontext()

    def describe(self) -> dict[str, Any]:
        """Plain data: how each was fitted and what it brought, and what was refused."""
        return {
            "fitted": [fitted.describe() for fitted in self.fitted.values()],
            "refused": [{"removed": list(removed), "reason": reason} for removed, reason in self.refused.items()],
        }


def repair_removals(
    loaded: Loaded,
    removals: Sequence[Removal],
    samples: Samples,
    held_out: Samples,
    work: Path | None,
    *,
    tokens: int = TOKENS,
    batch_tokens: int | None = None,
    ledger: Path | None = None,
    progress: Progress = silent,
) -> Repairs:
    """Repair every removal that can be repaired exactly, in the dtype in which its checkpoint will be written.

    Args:
        loaded: the model.
        removals: sorted original indices of each.
        samples: calibration samples; the first of so many `tokens` together are used.
        held_out: other samples, to measure on.
        work: folder in which finished repairs are kept and found again; None keeps none.
        tokens: of calibration.
        batch_tokens: padded tokens a batch.
        ledger: folder of measurements, see `excise.measuring.measure`.
        progress: shows progress.

    """
    stack, samples = loaded.stack, samples.first_tokens(tokens)
    if reason := _unfit(loaded, samples):
        return Repairs({}, dict.fromkeys(removals, reason))
    refused = dict(_refused(stack, removals))
    wanted = [removed for removed in dict.fromkeys(removals) if removed not in refused]
    key = {
        "model_hash": model_identity(stack.model),
        "samples": [samples.hash, held_out.hash],
        "dtype": str(loaded.stored_dtype),
    }
    files = {removed: work / f"{_digest({**key, 'removed': removed})}.safetensors" for removed in wanted if work}
    fitted = {removed: Repair.load(path) for removed, path in files.items() if path.exists()}
    new = [removed for removed in wanted if removed not in fitted]
    passes = 1 + sum(len(cuts_of(stack, removed)) for removed in new)
    try:
        with progress("repair", samples.tokens * passes if new else 0) as advance:
            for result in repair_each(
                stack,
                new,
                samples,
                held_out=held_out,
                dtype=loaded.stored_dtype,
                batch_tokens=batch_tokens,
                ledger=ledger,
                advance=advance,
            ):
                fitted[result.removed] = result
                if work:
                    result.save(files[result.removed])
    except InputError as error:  # the model's streams overflow on these samples
        refused |= {removed: str(error) for removed in new if removed not in fitted}
    return Repairs({removed: fitted[removed] for removed in wanted if removed in fitted}, refused)


def write_removal(
    loaded: Loaded,
    removed: Removal,
    repairs: Repairs,
    out: Path,
    card: Mapping[str, Any] | None = None,
    test: Test | None = None,
) -> dict[str, Any]:
    """Write the checkpoint without some blocks, repaired where that helps; replaces one that is there.

    From folder to folder byte by byte, save for the matrices that were repaired; only a GGUF file comes from memory.
    Returns what `excise.surgery.checkpoint.write_pruned` does.
    """
    if repairs.helpful(removed) is None and loaded.folder is not None:
        card = {"original": loaded.source, **(card or {})}
        return prune_folder(loaded.folder, removed, out, card=card, overwrite=True, test=test)
    with repairs.applied(loaded.stack, removed):
        return write_pruned(
            loaded.stack,
            removed,
            out,
            source=loaded.folder,
            tokenizer=loaded.tokenizer,
            dtype=loaded.stored_dtype,
            card=card,
            overwrite=True,
            test=test,
        )


def _unfit(loaded: Loaded, samples: Samples) -> str | None:
    """Why nothing of this model can be repaired on these samples."""
    if loaded.folder is not None and read_json(loaded.folder / "config.json").get("quantization_config"):
        return "its weights are stored quantised, and a repaired matrix would have to be quantised anew"
    if len(samples) < 2:
        return f"it takes at least two calibration samples, got {len(samples)}"
    return None


def _refused(stack: Stack, removals: Iterable[Removal]) -> Iterable[tuple[Removal, str]]:
    for removed in removals:
        try:
            require_repairable(stack, removed)
        except ArchitectureError as error:
            yield removed, str(error)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
