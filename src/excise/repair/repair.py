"""Closed-form repair: linear maps, folded into kept matrices, that make up for removed blocks without training.

The idea is ReplaceMe's (arXiv 2505.02819). At each cut, let M be the feed-forward output of the last kept block below,
Y the rest of its residual stream in the student as repaired so far, and L the original's stream after the removed run:

    T = argmin Σₜ wₜ ‖Mₜ T + Yₜ − Lₜ‖² + ridge · s ‖T − I‖²,      s the mean diagonal of MᵀWM,

and the down projection's output is multiplied by T, which is exact: no parameter is added, and the checkpoint is of the
same architecture. Beyond the paper: several cuts, refitted in sequence on the repaired stream; the ridge chosen on
held-out samples; tokens weighted by the gradient of the loss; other matrices to fold into; and the whole matrix
refitted on its input (`features="input"`, the default where it is not too wide) instead of a map of its output.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.data.batches import Batch, default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.errors import InputError
from excise.measuring.measure import measure
from excise.models.identity import model_identity
from excise.models.stack import Stack, block_indices
from excise.repair.cuts import Projection, cuts_of, output_projections
from excise.repair.refitted import Losses, Repair, Step
from excise.repair.ridge import RIDGES, NormalEquations, held_out_errors
from excise.repair.streams import WEIGHTINGS, Scratch, original_streams, student_streams, swapped
from excise.surgery.merge import Run

FEATURES = ("output", "input")
AUTO = "auto"
WIDEST_INPUT = 8192  # above it, the eigenvectors of the inputs' normal equations cost more than they bring
EVERY = 5  # one sample in so many chooses the ridge


def repair(stack: Stack, removed: Sequence[int], samples: Samples, **options: Any) -> Repair:
    """Fit the repair of one removal; arguments as for `repair_each`."""
    return next(repair_each(stack, [removed], samples, **options))


def repair_each(
    stack: Stack,
    removals: Sequence[Sequence[int]],
    samples: Samples,
    *,
    held_out: Samples | None = None,
    into: Sequence[str] | None = None,
    features: str = AUTO,
    weighting: str = "uniform",
    ridges: Sequence[float] = RIDGES,
    dtype: torch.dtype | None = None,
    batch_tokens: int | None = None,
    ledger: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Repair]:
    """Fit the repairs of several removals, one after the other; the model itself is left as it was.

    The original runs once over the samples for all cuts of all removals. The student runs from cut to cut: the streams
    wait on disk, so that memory holds one batch. Every fifth sample is kept out of the fit to choose the ridge, and
    joins it after.

    Args:
        stack: the original model.
        removals: original indices of each.
        samples: calibration samples, at least two.
        held_out: other samples on which the loss is measured, without removal, with it, and repaired.
        into: kinds of sublayers of the block below a cut to fold into, one after the other, each refitted on the
            stream that the one before it repaired. By default the last, which in a transformer is the feed-forward,
            as in ReplaceMe. Before a sequential
            feed-forward, "attention" is fitted as if the feed-forward did not react; what follows corrects that. It
            did not pay on the model measured here.
        features: "output" fits a map of the sublayer's output (width² numbers), as ReplaceMe does; "input" refits the
            whole matrix on its inputs (width × inner width), which did better on the model measured here, and whose
            normal equations need 16 bytes × inner width² of memory; "auto" is "input" for inner widths up to 8,192.
        weighting: what a token's error weighs, see `streams.original_streams`.
        ridges: strengths to choose from, relative to the features' mean square, each > 0; an infinite one stands for
            leaving the matrix alone.
        dtype: of the new weights, in which they will be written; None keeps that of the loaded model.
        batch_tokens: padded tokens a batch.
        ledger: folder in which the measured losses are kept and found again.
        advance: called with the tokens of each batch, once for the original and once for each fitted matrix.

    Yields:
        New weights, to be used with `repaired`, in the order of the removals. The original's pass is part of the cost
        of the first.

    Raises:
        InputError: an option is out of range, or there are fewer than two samples.
        ArchitectureError: folding would not be exact, or there is no kept block below a cut.

    """
    _check_options(samples, features, weighting, ridges)
    if not removals:
        return
    targets = [_Target.of(stack, removed, into) for removed in removals]
    batches = [b.to(stack.device) for b in make_batches(samples, batch_tokens or default_batch_tokens(stack))]
    n, report = len(stack.blocks), advance or (lambda _: None)
    tops = sorted({cut.removed[-1] for target in targets for cut in target.cuts})
    blocks_run = n + 2 * (n - tops[0]) if weighting == "gradient" else tops[-1] + 1
    facts = {
        "model_hash": model_identity(stack.model),
        "samples": samples.describe(),
        "settings": {"into": into and list(into), "features": features, "weighting": weighting},
    }
    with tempfile.TemporaryDirectory(prefix="excise-repair-") as place:
        scratch = Scratch(Path(place))
        _keep_targets(stack, batches, tops, weighting, scratch, report)
        for target in targets:
            weights, steps, student_blocks = _fit(stack, batches, scratch, target, features, ridges, dtype, report)
            cost = samples.tokens * (blocks_run + student_blocks) / n
            fitted = Repair(target.removed, weights, steps, cost, None, facts)
            yield fitted if held_out is None else _judged(stack, fitted, held_out, batch_tokens, ledger)
            blocks_run = 0


@dataclass(frozen=True, eq=False)
class _Target:
    """A removal, its cuts, and the matrices to fold into, bottom to top."""

    removed: tuple[int, ...]
    cuts: tuple[Run, ...]
    projections: tuple[Projection, ...]

    @staticmethod
    def of(stack: Stack, removed: Sequence[int], into: Sequence[str] | None) -> _Target:
        cuts = cuts_of(stack, removed)
        projections = output_projections(stack, [cut.kept for cut in cuts], into)
        return _Target(block_indices(stack, removed), cuts, tuple(projections))


def require_repairable(stack: Stack, removed: Sequence[int], into: Sequence[str] | None = None) -> None:
    """Refuse a removal whose repair cannot be folded exactly; costs a pass of a few tokens.

    Raises:
        ArchitectureError: see `repair_each`.

    """
    _Target.of(stack, removed, into)


def _fit(
    stack: Stack,
    batches: Sequence[Batch],
    scratch: Scratch,
    target: _Target,
    features: str,
    ridges: Sequence[float],
    dtype: torch.dtype | None,
    report: Callable[[int], None],
) -> tuple[dict[str, Tensor], tuple[Step, ...], int]:
    """New weights of one removal, how they were fitted, and how many blocks the student ran through."""
    weights: dict[str, Tensor] = {}
    steps, start, blocks_run = [], 0, 0
    with contextlib.ExitStack() as folded:
        for projection in target.projections:
            cut = next(cut for cut in target.cuts if cut.kept == projection.sublayer.block)
            fitted = _features_of(projection, features)
            fit, choice = _gather(stack, batches, scratch, start, target.removed, projection, cut, fitted, report)
            blocks_run += sum(i not in target.removed for i in range(start, cut.kept + 1))
            errors = held_out_errors(fit, choice, ridges)
            best = min(range(len(ridges)), key=errors.__getitem__)
            new = _folded(projection, (fit + choice).solve(ridges[best]), fitted)
            new = {name: tensor.to(dtype or tensor.dtype) for name, tensor in new.items()}
            folded.enter_context(swapped(stack.model, new))
            weights |= new
            steps.append(Step(cut.kept, projection.sublayer.kind, cut.removed, fitted, ridges[best], errors[best]))
            start = cut.kept
    return weights, tuple(steps), blocks_run


def _features_of(projection: Projection, features: str) -> str:
    if features != AUTO:
        return features
    return "input" if projection.matrix.shape[0] <= WIDEST_INPUT else "output"


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
    if repair.facts.get("model_hash") != model_identity(stack.model):
        raise InputError(
            "this repair was fitted on another model, or in another dtype; fit it anew, or load the model as it was"
        )
    with swapped(stack.model, repair.weights):
        yield repair.removed


def _check_options(samples: Samples, features: str, weighting: str, ridges: Sequence[float]) -> None:
    if features not in (AUTO, *FEATURES) or weighting not in WEIGHTINGS:
        raise InputError(
            f"expected features in {(AUTO, *FEATURES)} and weighting in {WEIGHTINGS}, "
            f"got '{features}' and '{weighting}'"
        )
    if not ridges or any(not ridge > 0 for ridge in ridges):
        raise InputError(f"expected ridges > 0, at least one, got {list(ridges)}")
    if len(samples) < 2:
        raise InputError(
            f"expected at least two samples, one to fit and one to choose the ridge on, got {len(samples)}"
        )


def _keep_targets(
    stack: Stack,
    batches: Sequence[Batch],
    tops: Sequence[int],
    weighting: str,
    scratch: Scratch,
    advance: Callable[[int], None],
) -> None:
    """Write the original's streams and the weights of their real tokens at every cut."""
    for number, batch in enumerate(batches):
        streams, weights = original_streams(stack, batch, tops, weighting)
        for top in tops:
            real = batch.real.to(streams[top].device)
            kept = {"stream": streams[top][real], "weights": weights[top][real.to(weights[top].device)]}
            if not all(tensor.isfinite().all() for tensor in kept.values()):
                raise InputError(f"the original's stream after block {top} is not finite; try --dtype float32")
            scratch.write(number, f"target-{top}", kept)
        advance(batch.tokens)


def _gather(
    stack: Stack,
    batches: Sequence[Batch],
    scratch: Scratch,
    start: int,
    removed: Sequence[int],
    projection: Projection,
    cut: Run,
    features: str,
    advance: Callable[[int], None],
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of one matrix, over the samples to fit and over those to choose the ridge by."""
    inner, width = projection.matrix.shape
    size, device = (inner if features == "input" else width), projection.module.weight.device
    fit, choice = (NormalEquations.zeros(size, width, device) for _ in range(2))
    samples = sum(len(batch.indices) for batch in batches)
    every = min(EVERY, samples)
    for number, batch in enumerate(batches):
        state = scratch.read(number, "state").get("state") if start > 0 else None
        state = None if state is None else state.to(stack.device)
        before, inputs, outputs, stream = student_streams(stack, batch, start, state, removed, projection)
        scratch.write(number, "state", {"state": before})
        target = scratch.read(number, f"target-{cut.removed[-1]}")
        real = batch.real.to(stream.device)
        residual = target["stream"].to(stream.device).double() - stream[real].double()
        phi = (inputs if features == "input" else outputs)[real.to(outputs.device)]
        chooses = torch.tensor([i % every == every - 1 for i in batch.indices], device=real.device)
        row = chooses.unsqueeze(1).expand_as(real)[real]
        for equations, rows in ((fit, ~row), (choice, row)):
            equations.add(
                phi[rows.to(phi.device)], residual[rows].to(device), target["weights"].to(device)[rows.to(device)]
            )
        advance(batch.tokens)
    return fit, choice


def _folded(projection: Projection, change: Tensor, features: str) -> dict[str, Tensor]:
    """New weights of a projection, whose output (or matrix) is to change by `change`."""
    matrix = projection.matrix.double()
    bias = getattr(projection.module, "bias", None)
    name = projection.name
    if features == "input":
        return {f"{name}.weight": projection.stored(matrix + change / projection.scale)}
    new = {f"{name}.weight": projection.stored(matrix + matrix @ change)}
    if bias is not None:
        wide = bias.data.double()
        new[f"{name}.bias"] = (wide + wide @ change).to(bias.dtype)
    return new


def _judged(stack: Stack, fitted: Repair, held_out: Samples, batch_tokens: int | None, ledger: Path | None) -> Repair:
    before = measure(stack, held_out, [(), fitted.removed], batch_tokens=batch_tokens, ledger=ledger)
    with swapped(stack.model, fitted.weights):
        after = measure(stack, held_out, [fitted.removed], batch_tokens=batch_tokens, ledger=ledger)
    losses = Losses(before.loss(), before.loss(fitted.removed), after.loss(fitted.removed))
    return replace(fitted, losses=losses, facts={**fitted.facts, "held_out": held_out.describe()})
