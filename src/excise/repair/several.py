"""Repair inside a run: the removals that measured best are repaired, and measured again as repaired."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from excise.context import Context
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.ising.problem import Removal
from excise.measuring.passes import pass_key
from excise.models.loading import Loaded
from excise.models.quantised import find_format
from excise.models.stack import Stack
from excise.models.stored import Stored
from excise.plain import Facts, Values
from excise.repair.measured import repairable_folds
from excise.repair.refitted import Repair
from excise.repair.repair import Folding, number_of_fits, repair_each, repaired, with_losses
from excise.settings import REPAIR_TOKENS
from excise.surgery.checkpoint import write_pruned
from excise.surgery.on_disk import prune_folder
from excise.surgery.publish import Test

# What measured best need not be best once repaired: of three the third became the best (log, 2026-11-24, the main job
# with repair).
REPAIRED = 3


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
        return fitted if fitted and fitted.losses and fitted.losses.helps else None

    def applied(self, stack: Stack, removed: Removal, *, always: bool = False) -> AbstractContextManager[Any]:
        """Context in which the model has the weights of the removal's repair, if it helps or `always`."""
        found = self.fitted.get(removed) if always else self.helpful(removed)
        return repaired(stack, found) if found else contextlib.nullcontext()

    def describe(self) -> Facts:
        """Plain data: how each was fitted and what it brought, and what was refused."""
        return {
            "fitted": [fitted.describe() for fitted in self.fitted.values()],
            "refused": [{"removed": list(removed), "reason": reason} for removed, reason in self.refused.items()],
        }


def repair_removals(
    context: Context, removals: Sequence[Removal], samples: Samples, held_out: Samples, *, tokens: int = REPAIR_TOKENS
) -> Repairs:
    """Repair every removal that can be repaired exactly, in the dtype in which its checkpoint will be written.

    Args:
        context: the model, and the store, in which finished repairs are kept and found again.
        removals: sorted original indices of each.
        samples: calibration samples; the first of so many `tokens` together are used.
        held_out: other samples, to measure on.
        tokens: of calibration.

    """
    loaded, samples = context.loaded, samples.first_tokens(tokens)
    if reason := _unfit(loaded, samples):
        return Repairs({}, dict.fromkeys(removals, reason))
    fits, refused = _fits(loaded, removals)
    wanted = list(fits)
    files = {removed: _file(context, removed, samples) for removed in wanted}
    fitted = context.team.once(
        lambda: {removed: Repair.load(path) for removed, path in files.items() if path and path.exists()}
    )
    new = [removed for removed in wanted if removed not in fitted]
    passes = 1 + sum(fits[removed] for removed in new)
    with context.progress.stage("repair", samples.tokens * passes + 3 * held_out.tokens * len(new) if new else 0):
        left = list(new)
        while left:
            try:
                for result in repair_each(context, tuple(left), samples):
                    fitted[left.pop(0)] = result
                    if path := files[result.removed]:
                        result.save(path)
            # Streams overflow without these blocks; the run goes on with the repairs of the others.
            except InputError as error:
                refused[left.pop(0)] = str(error)
        judged = {r: with_losses(context, fitted[r], held_out) for r in wanted if r in fitted}
    return Repairs(judged, refused)


def _file(context: Context, removed: Removal, samples: Samples) -> Path | None:
    """Where the store keeps the repair of a removal; its losses are with all others that were measured."""
    key = {**pass_key(context, samples, {}), "removed": list(removed), "folding": asdict(Folding())}
    place = context.store.place("repairs", {**key, "dtype": str(context.loaded.stored_dtype)})
    return place and place / "repair.safetensors"


def write_removal(
    loaded: Loaded,
    removed: Removal,
    repairs: Repairs,
    out: Path,
    card: Values | None = None,
    test: Test | None = None,
) -> Facts:
    """Write the checkpoint without some blocks, repaired where that helps; replaces one that is there.

    From folder to folder byte by byte, save for the matrices that were repaired; only a GGUF file comes from memory.
    Returns what `excise.surgery.checkpoint.write_pruned` does.
    """
    # Byte by byte where no matrix changed: nothing is rounded, and a quantisation stays as it is.
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
            requantise=True,
            test=test,
        )


def is_repairable(loaded: Loaded, samples: Samples) -> bool:
    """Whether a removal from this model may be repaired at some cut; costs a pass of a few tokens."""
    return _unfit(loaded, samples) is None and bool(repairable_folds(loaded))


def _unfit(loaded: Loaded, samples: Samples) -> str | None:
    """Why nothing of this model can be repaired on these samples."""
    settings = (loaded.raw_config or {}).get("quantization_config")
    if settings and loaded.folder is not None and find_format(loaded.folder, settings) is None:
        method = settings.get("quant_method", "by an unnamed tool")
        return f"its weights are stored quantised ({method}), and only float8 matrices are quantised anew once repaired"
    if len(samples) < 2:
        return f"it takes at least two calibration samples, got {len(samples)}"
    return None


def _fits(loaded: Loaded, removals: Iterable[Removal]) -> tuple[dict[Removal, int], dict[Removal, str]]:
    """How many matrices the repair of each refits; and of those that cannot be repaired, why."""
    fits: dict[Removal, int] = {}
    refused: dict[Removal, str] = {}
    stored = Stored.of(loaded)
    for removed in dict.fromkeys(removals):
        try:
            fits[removed] = number_of_fits(loaded.stack, stored, removed)
        except ArchitectureError as error:
            refused[removed] = str(error)
    return fits, refused
