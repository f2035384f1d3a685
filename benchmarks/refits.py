"""Least squares of a cut's missing stream on what kept blocks compute, step by step, rounded as it would be stored.

The same sums and ridges as `excise.repair`, with two liberties: any kept block up to the target may be refitted, alone
or several at once, and a matrix may get a factor for each of its output channels only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.patches import MapOf, patched
from excise.context import Context
from excise.data.samples import Samples
from excise.measuring.sweep import run_blocks
from excise.models.stack import override_forward, pass_through
from excise.repair.cuts import cuts_of, folds_of
from excise.repair.folds import Projection, as_features
from excise.repair.repair import EVERY
from excise.repair.ridge import RIDGES, GainEquations, NormalEquations
from excise.repair.streams import original_streams, recorded_at, recorded_streams, swapped
from excise.surgery.merge import Run

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One fit.

    Attributes:
        blocks: whose matrices are refitted, on all their features at once; the highest is where the error is taken.
        target: block after which the original's stream is the aim.
        kind: of their sublayers; None takes the last.
        features: "input", "output", or "gain", a factor for each output channel.

    """

    blocks: tuple[int, ...]
    target: int
    kind: str | None = None
    features: str = "input"


class Refitting:
    """Fits of one removal on the same samples; the original runs once for all of them.

    Args:
        context: the original model.
        removed: original indices.
        samples: to fit on; every fifth chooses the ridge, and joins the fit after.

    """

    def __init__(self, context: Context, removed: Sequence[int], samples: Samples) -> None:
        self.stack, self.removed, self.stored = context.stack, tuple(removed), context.loaded.stored_dtype
        self.cuts = cuts_of(self.stack, removed)
        self.batches = [batch.to(self.stack.device) for batch in context.batches(samples)]
        self.choosing = samples.picked(EVERY, [EVERY - 1])
        above = [top + 1 for top in self._ends if top + 1 < len(self.stack.blocks)]
        wanted = sorted({*self._ends, *above})
        self.targets = [original_streams(self.stack, batch, wanted, "uniform")[0] for batch in self.batches]

    @property
    def _ends(self) -> list[int]:
        return [cut.removed[-1] for cut in self.cuts]

    def weights(self, steps: Sequence[Step]) -> Weights:
        """New weights by name, each step fitted on the stream as the ones before it made it."""
        found: Weights = {}
        with contextlib.ExitStack() as folded:
            for step in steps:
                new = self._fitted(step)
                folded.enter_context(swapped(self.stack.model, new))
                found |= new
        return found

    def maps(self, map_of: MapOf) -> dict[int, Tensor]:
        """A map of the stream at each cut, bottom to top, each fitted on the stream as the ones below made it."""
        found: dict[int, Tensor] = {}
        for cut in self.cuts:
            before, after = zip(*(self._around(cut, number, found) for number in range(len(self.batches))), strict=True)
            found[cut.removed[0]] = map_of(torch.cat(before), torch.cat(after))
        return found

    def _around(self, cut: Run, number: int, maps: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The student's stream before a cut and the original's after it [tokens, width], of a batch's real tokens."""
        batch = self.batches[number]
        above = dict.fromkeys((b.module for b in self.stack.blocks[cut.removed[0] :]), pass_through(self.stack))
        below = patched(self.stack, [i for i in self.removed if i < cut.kept], maps)
        with torch.no_grad(), recorded_streams(self.stack, [cut.kept]) as streams, below, override_forward(above):
            self.stack.hidden(batch.input_ids)
        return streams[cut.kept][batch.real].double(), self.targets[number][cut.removed[-1]][batch.real].double()

    def _fitted(self, step: Step) -> Weights:
        folds = [self._fold(block, step.kind) for block in step.blocks]
        fit, choice = (self._zeros(folds, step.features) for _ in range(2))
        for number, batch in enumerate(self.batches):
            self._add(step, folds, batch, self.targets[number][step.target], (fit, choice))
        errors = fit.held_out_errors(choice, RIDGES)
        best = min(range(len(RIDGES)), key=errors.__getitem__)
        change = (fit + choice).solve(RIDGES[best])
        new = _folded(folds, change, step.features)
        return {name: tensor.to(self.stored) for name, tensor in new.items()}

    def _fold(self, block: int, kind: str | None) -> Projection:
        found = folds_of(self.stack, [block], None if kind is None else [kind])[block]
        if isinstance(found, Exception):
            raise found
        (fold,) = found
        if not isinstance(fold, Projection):
            raise TypeError(f"expected a matrix at the end of {fold.sublayer.name}, got {type(fold).__name__}")
        return fold

    def _zeros(self, folds: Sequence[Projection], features: str) -> Any:
        width = folds[0].matrix.shape[1]
        if features == "gain":
            return GainEquations.zeros(width, self.stack.device)
        rows = sum(fold.matrix.shape[0] if features == "input" else width for fold in folds)
        return NormalEquations.zeros(rows, width, self.stack.device)

    def _add(self, step: Step, folds: Sequence[Projection], batch: Any, target: Tensor, sums: Sequence[Any]) -> None:
        at = max(step.blocks)
        with torch.no_grad(), contextlib.ExitStack() as records:
            streams = records.enter_context(recorded_streams(self.stack, [at]))
            found = [records.enter_context(recorded_at(fold)) for fold in folds]
            run_blocks(self.stack, batch.input_ids, 0, at + 1, removed=self.removed)
        kinds = "input" if step.features == "input" else "output"
        chooses = torch.tensor([i in self.choosing for i in batch.indices]).unsqueeze(1) & batch.real
        for equations, rows in zip(sums, (batch.real & ~chooses, chooses), strict=True):
            residual = target[rows].double() - streams[at][rows].double()
            phi = torch.cat([as_features(each, kinds, rows) for each in found], dim=-1)
            equations.add(phi, residual, torch.ones(len(residual)))


def _folded(folds: Sequence[Projection], change: Tensor, features: str) -> Weights:
    if features == "gain":
        (fold,) = folds
        return fold.folded(torch.diag(change), "output")
    parts = change.split([fold.matrix.shape[0] if features == "input" else change.shape[1] for fold in folds])
    return {n: w for fold, part in zip(folds, parts, strict=True) for n, w in fold.folded(part, features).items()}
