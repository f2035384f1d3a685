"""Closed-form repair: linear maps, folded into kept matrices, that make up for removed blocks without training.

The idea is ReplaceMe's (arXiv 2505.02819). At each cut, let M be the feed-forward output of the last kept block below,
Y the rest of its residual stream in the student as repaired so far, and L the original's stream after the removed run:

    T = argmin Σₜ wₜ ‖Mₜ T + Yₜ − Lₜ‖² + ridge · s ‖T − I‖²,      s the mean diagonal of MᵀWM,

and the down projection's output is multiplied by T, which is exact: no parameter is added, and the checkpoint is of the
same architecture. Beyond the paper: several cuts, refitted in sequence on the repaired stream; the ridge chosen on
held-out samples; tokens weighted by the gradient of the loss; other matrices to fold into; the whole matrix refitted on
its input (`features="input"`, the default where it is not too wide) instead of a map of its output; and the block above
the cut refitted after it, towards the original's stream after that block, for what no block below can make up for.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.measuring.measure import measure
from excise.measuring.passes import over_batches
from excise.measuring.sweep import Streams, alone, embedded, sweeps
from excise.models.identity import model_identity
from excise.models.residency import held
from excise.models.stack import Stack, block_indices
from excise.models.stored import Stored
from excise.plain import Facts
from excise.repair.cuts import cuts_of, folds_of
from excise.repair.folds import AUTO, FEATURES, Fold, as_features
from excise.repair.refitted import Losses, Repair, Step
from excise.repair.ridge import RIDGES, Equations
from excise.repair.streams import WEIGHTINGS, Scratch, original_streams, student_streams, swapped, weights_of
from excise.surgery.merge import Run

STAGE = "repair"
# One sample in so many chooses the ridge; all join the fit after.
EVERY = 5


@dataclass(frozen=True)
class Folding:
    """What is folded where, and how it is fitted.

    Attributes:
        into: kinds of sublayers of the blocks next to a cut to fold into, one after the other, each refitted on the
            stream that the one before it repaired. None takes the last, which in a transformer is the feed-forward, as
            in ReplaceMe. Before a sequential feed-forward, "attention" is fitted as if the feed-forward did not react;
            what follows corrects that. It did not pay on the model measured here.
        features: "output" fits a map of the sublayer's output (width² numbers), as ReplaceMe does; "input" refits the
            whole matrix on its inputs (width × inner width), which did better on the model measured here, and whose
            normal equations need 16 bytes × inner width² of memory; "auto" is "input" for inner widths up to 8,192.
        weighting: what a token's error weighs, see `streams.original_streams`.
        above: also fold into the block above each cut, towards the original's stream after that block, where that is
            exact and the block is not itself below the next cut, whose repair refits it: up to twice the fits.
        ridges: strengths to choose from, relative to the features' mean square, each > 0; an infinite one stands for
            leaving the matrix alone.

    Raises:
        InputError: one of them is out of range.

    """

    into: tuple[str, ...] | None = None
    features: str = AUTO
    weighting: str = "uniform"
    above: bool = True
    ridges: tuple[float, ...] = RIDGES

    def __post_init__(self) -> None:
        if self.features not in (AUTO, *FEATURES) or self.weighting not in WEIGHTINGS:
            raise InputError(
                f"expected features in {(AUTO, *FEATURES)} and weighting in {WEIGHTINGS}, "
                f"got '{self.features}' and '{self.weighting}'"
            )
        if not self.ridges or not all(ridge > 0 for ridge in self.ridges):
            raise InputError(f"expected ridges > 0, at least one, got {list(self.ridges)}")


def repair(
    context: Context,
    removed: Sequence[int],
    samples: Samples,
    *,
    held_out: Samples | None = None,
    folding: Folding | None = None,
) -> Repair:
    """Fit the repair of one removal; arguments as for `repair_each`."""
    return next(repair_each(context, [removed], samples, held_out=held_out, folding=folding))


def repair_each(
    context: Context,
    removals: Sequence[Sequence[int]],
    samples: Samples,
    *,
    held_out: Samples | None = None,
    folding: Folding | None = None,
) -> Iterator[Repair]:
    """Fit the repairs of several removals, one after the other; the model itself is left as it was.

    The original runs once over the samples for all cuts of all removals. The student runs from cut to cut: the streams
    wait on disk, so that memory holds one batch. Every fifth sample is kept out of the fit to choose the ridge, and
    joins it after. New weights have the dtype in which the checkpoint will be written.

    Args:
        context: the original model, and the store for measured losses.
        removals: original indices of each.
        samples: calibration samples, at least two.
        held_out: other samples on which the loss is measured, without removal, with it, and repaired.
        folding: what is folded where; by default the last matrix below each cut, then that of the block above it.

    Yields:
        New weights, to be used with `repaired`, in the order of the removals. The cost of each is what it would be
        alone, so that it does not depend on what was repaired before: the original's pass counts for each of them.

    Raises:
        InputError: there are fewer than two samples, or streams overflow; of the removals, the one whose turn it is.
        ArchitectureError: at no cut of a removal would folding be exact; where it is at some, others are left alone.

    """
    if len(samples) < 2:
        raise InputError(
            f"expected at least two samples, one to fit and one to choose the ridge on, got {len(samples)}"
        )
    if not removals:
        return
    stack, folding = context.stack, folding or Folding()
    stored = Stored.of(context.loaded)
    targets = [_Target.of(stack, stored, removed, folding) for removed in removals]
    n = len(stack.blocks)
    tops = sorted({part.top for target in targets for part in target.parts})
    facts = {
        "model_hash": context.identity,
        "samples": samples.describe(),
        "settings": {
            "into": folding.into and list(folding.into),
            "features": folding.features,
            "weighting": folding.weighting,
            "above": folding.above,
        },
    }
    with tempfile.TemporaryDirectory(prefix="excise-repair-") as place:
        fitting = _Fitting(context, samples, folding, stored, Scratch(Path(place)))
        fitting.keep_targets(tops)
        for target in targets:
            weights, steps, student_blocks = fitting.fit(target)
            ends = [part.top for part in target.parts]
            original_blocks = n + 2 * (n - min(ends)) if folding.weighting == "gradient" else max(ends) + 1
            cost = samples.tokens * (original_blocks + student_blocks) / n
            left_alone = list(target.left_alone)
            fitted = Repair(target.removed, weights, steps, cost, None, {**facts, "left_alone": left_alone})
            yield fitted if held_out is None else with_losses(context, fitted, held_out)


@dataclass(frozen=True)
class _Part:
    """One matrix to refit.

    Attributes:
        fold: what is refitted.
        run: the removed run that it makes up for.
        top: block after which the original's stream is the aim.

    """

    fold: Fold
    run: tuple[int, ...]
    top: int


@dataclass(frozen=True, eq=False)
class _Target:
    """A removal, and the matrices to refit, bottom to top.

    Cuts next to which none can be are left alone, with the reason.
    """

    removed: tuple[int, ...]
    parts: tuple[_Part, ...]
    left_alone: tuple[Facts, ...]

    @staticmethod
    def of(stack: Stack, stored: Stored, removed: Sequence[int], folding: Folding) -> _Target:
        cuts = {cut.kept: cut for cut in cuts_of(stack, removed)}
        over = {cut.removed[-1] + 1: cut for cut in cuts.values() if folding.above}
        # The block between two cuts is refitted for the upper one, whose aim lies higher.
        over = {block: cut for block, cut in over.items() if block < len(stack.blocks) and block not in cuts}
        parts: list[_Part] = []
        reasons: dict[Run, ArchitectureError] = {}
        # From the bottom up; folds into one block in the order that was asked for.
        for block, folds in sorted(folds_of(stack, [*cuts, *over], folding.into).items()):
            cut = cuts.get(block) or over[block]
            if not isinstance(folds, ArchitectureError):
                folds = stored.refusal(name for fold in folds for name in fold.names) or folds
            if isinstance(folds, ArchitectureError):
                reasons.setdefault(cut, folds)
            else:
                top = cut.removed[-1] if block in cuts else block
                parts += [_Part(fold, cut.removed, top) for fold in folds]
        if not parts:
            raise next(iter(reasons.values()))
        mended = {part.run for part in parts}
        left_alone = tuple(
            {"run": list(cut.removed), "reason": str(reason)}
            for cut, reason in reasons.items()
            if cut.removed not in mended
        )
        return _Target(block_indices(stack, removed), tuple(parts), left_alone)


def number_of_fits(stack: Stack, stored: Stored, removed: Sequence[int]) -> int:
    """How many matrices the repair of a removal refits by default; costs a pass of a few tokens.

    Args:
        stack: the model's blocks.
        stored: how its parameters are stored, which takes reading its headers once.
        removed: block indices.

    Raises:
        ArchitectureError: see `repair_each`.

    """
    return len(_Target.of(stack, stored, removed, Folding()).parts)


@dataclass(frozen=True, eq=False)
class _Fitting:
    """One fit of several removals on the same samples, whose streams wait in a scratch folder."""

    context: Context
    samples: Samples
    folding: Folding
    stored: Stored
    scratch: Scratch

    def keep_targets(self, tops: Sequence[int]) -> None:
        """Write the original's streams and the weights of their real tokens at every cut."""
        # Weights by gradient need a backward pass through all blocks above, which the model itself makes.
        if sweeps(self.context.stack) and self.folding.weighting != "gradient":
            self._sweep_targets(tops)
            return
        for number, batch in self._batches():
            streams, weights = original_streams(self.context.stack, batch, tops, self.folding.weighting)
            for top in tops:
                self._keep_target(number, batch, top, streams[top], weights[top])

    @torch.no_grad()
    def _sweep_targets(self, tops: Sequence[int]) -> None:
        stack = self.context.stack
        with Streams() as streams:
            for number, batch in self._batches():
                streams.put(number, embedded(stack, batch.input_ids))
            for index in range(tops[-1] + 1):
                with alone(stack, index) as through:
                    for number, batch in self._batches():
                        stream = through(batch.input_ids, streams.take(number, stack.device))
                        if index in tops:
                            weights = weights_of(stream, self.folding.weighting)
                            self._keep_target(number, batch, index, stream, weights)
                        streams.put(number, stream)

    def _keep_target(self, number: int, batch: Batch, top: int, stream: Tensor, weights: Tensor) -> None:
        real = batch.real
        kept = {"stream": stream[real.to(stream.device)], "weights": weights[real.to(weights.device)]}
        if not all(tensor.isfinite().all() for tensor in kept.values()):
            # One infinite token would make the sums of all tokens useless.
            raise InputError(f"the original's stream after block {top} is not finite; try --dtype float32")
        self.scratch.write(number, f"target-{top}", kept)

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """The batches of this process, whose streams only it keeps."""
        return over_batches(self.context, self.samples, STAGE, shared=True)

    def fit(self, target: _Target) -> tuple[dict[str, Tensor], tuple[Step, ...], int]:
        """New weights of one removal, how they were fitted, and how many blocks the student ran through."""
        weights: dict[str, Tensor] = {}
        steps: list[Step] = []
        start, blocks_run, ridges = 0, 0, self.folding.ridges
        with contextlib.ExitStack() as folded:
            for part in target.parts:
                fold, block = part.fold, part.fold.sublayer.block
                blocks_run += sum(i not in target.removed for i in range(start, block + 1))
                start = self._advanced(start, block, target.removed)
                features = fold.features(self.folding.features)
                with held(self.context.stack.blocks[block].module):
                    fit, choice = self._gather(start, target.removed, part, features)
                    errors = fit.held_out_errors(choice, ridges)  # type: ignore[arg-type]
                    best = min(range(len(ridges)), key=errors.__getitem__)
                    # The ridge is chosen on samples kept out; the matrix is then fitted on all of them.
                    new = fold.folded((fit + choice).solve(ridges[best]), features)  # type: ignore[operator]
                    new = self.stored.rounded(new)
                # The next is fitted on the stream as repaired so far, and as rounded to what will be written.
                folded.enter_context(swapped(self.context.stack.model, new))
                weights |= new
                # Rounded, since the order of a sum over processes is not that over batches.
                error = round(errors[best], 9)
                steps.append(Step(block, fold.sublayer.kind, part.run, features, ridges[best], error))
                start = block
        return weights, tuple(steps), blocks_run

    @torch.no_grad()
    def _advanced(self, start: int, stop: int, removed: Sequence[int]) -> int:
        """Bring the student's states before block `start` to before block `stop`, where it goes block by block.

        Returns the block before which they are now.
        """
        stack = self.context.stack
        if not sweeps(stack):
            return start
        if start == 0:
            for number, batch in self._batches():
                self.scratch.write(number, "state", {"state": embedded(stack, batch.input_ids)})
        for index in (i for i in range(start, stop) if i not in removed):
            with alone(stack, index) as through:
                for number, batch in self._batches():
                    state = self.scratch.read(number, "state")["state"].to(stack.device)
                    self.scratch.write(number, "state", {"state": through(batch.input_ids, state)})
        return stop

    def _gather(self, start: int, removed: Sequence[int], part: _Part, features: str) -> tuple[Equations, Equations]:
        """Normal equations of one fold, over the samples to fit and over those to choose the ridge by."""
        stack, fold = self.context.stack, part.fold
        fit, choice = fold.equations(features), fold.equations(features)
        device = fit.gram.device
        every = min(EVERY, len(self.samples))
        choosing = self.samples.picked(every, [every - 1])
        for number, batch in self._batches():
            state = self.scratch.read(number, "state").get("state") if start > 0 else None
            state = None if state is None else state.to(stack.device)
            before, found, stream = student_streams(stack, batch, start, state, removed, fold)
            # The next matrix lies above, so its pass starts here and not at the embedding.
            self.scratch.write(number, "state", {"state": before})
            target = self.scratch.read(number, f"target-{part.top}")
            real = batch.real.to(stream.device)
            residual = target["stream"].to(stream.device).double() - stream[real].double()
            phi = as_features(found, features, real)
            # By the sample's number, not the batch's: batches hold samples of similar length, and short chats differ
            # from long ones.
            chooses = torch.tensor([i in choosing for i in batch.indices], device=real.device)
            row = chooses.unsqueeze(1).expand_as(real)[real]
            for equations, rows in ((fit, ~row), (choice, row)):
                equations.add(
                    phi[rows.to(phi.device)], residual[rows].to(device), target["weights"].to(device)[rows.to(device)]
                )
        for equations in (fit, choice):
            for sums in (equations.gram, equations.cross, equations.square):
                self.context.team.total(sums)
            if not all(sums.isfinite().all() for sums in (equations.gram, equations.cross, equations.square)):
                block = fold.sublayer.block
                raise InputError(f"without the removed blocks, block {block} overflows; try --dtype float32")
        return fit, choice


@contextlib.contextmanager
def repaired(stack: Stack, repair: Repair) -> Iterator[tuple[int, ...]]:
    """Context in which the model has the repair's weights; its own come back at the end.

    The removed blocks are still there: remove them, for a while with `bypass` or `measure`, for good with
    `write_pruned`, inside this context. The intact model's loss is measured outside it.

    Args:
        stack: the original model, as it was when the repair was fitted.
        repair: from `repair`, or loaded.

    Yields:
        The blocks to remove, sorted original indices.

    Raises:
        InputError: the repair was fitted on another model, or on this one loaded in another dtype.

    """
    # Weights of another model would fit in shape and be wrong in silence.
    if repair.facts.get("model_hash") != model_identity(stack.model):
        raise InputError(
            "this repair was fitted on another model, or in another dtype; fit it anew, or load the model as it was"
        )
    with swapped(stack.model, repair.weights):
        yield repair.removed


def with_losses(context: Context, fitted: Repair, held_out: Samples) -> Repair:
    """The repair with its losses on held-out samples, which the store may know."""
    before = measure(context, held_out, [(), fitted.removed])
    with swapped(context.stack.model, fitted.weights):
        after = measure(context, held_out, [fitted.removed])
    losses = Losses(before.loss(), before.loss(fitted.removed), after.loss(fitted.removed))
    return replace(fitted, losses=losses, facts={**fitted.facts, "held_out": held_out.describe()})
