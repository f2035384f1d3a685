"""Closed-form repair: linear maps, folded into kept matrices, that make up for removed blocks without training.

The idea is ReplaceMe's (arXiv 2505.02819). At each cut, let M be the feed-forward output of the last kept block below,
Y the rest of its residual stream in the student as repaired so far, and L the original's stream after the removed run:

    T = argmin Σₜ wₜ ‖Mₜ T + Yₜ − Lₜ‖² + ridge · s ‖T − I‖²,      s the mean diagonal of MᵀWM,

and the down projection's output is multiplied by T, which is exact: no parameter is added, and the checkpoint is of the
same architecture. Beyond the paper: several cuts, refitted in sequence on the repaired stream; the ridge chosen on
held-out samples; tokens weighted by the gradient of the loss; other matrices to fold into; and the whole matrix
refitted on its input (`features="input"`, the default) instead of a map of its output.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from excise.artefacts import atomic_path
from excise.calibration.batches import Batch, default_batch_tokens, make_batches
from excise.calibration.samples import Samples
from excise.errors import InputError
from excise.healing.cuts import Projection, cuts_of, output_projections
from excise.healing.ridge import RIDGES, NormalEquations, held_out_errors
from excise.healing.streams import WEIGHTINGS, Scratch, original_streams, student_streams, swapped
from excise.measure import measure
from excise.models.stack import Stack, block_indices
from excise.provenance import model_hash
from excise.surgery.merge import Run

FORMAT = "excise repair 1"
FEATURES = ("output", "input")
EVERY = 5  # one sample in so many chooses the ridge


@dataclass(frozen=True)
class Step:
    """One fitted matrix.

    Attributes:
        block: original index of the block it belongs to.
        kind: of its sublayer.
        run: the removed run that it makes up for.
        ridge: chosen strength, relative to the features' mean square; infinite where no map helped held-out samples.
        error: weighted squared error of the stream on held-out samples, as a share of that without the step.

    """

    block: int
    kind: str
    run: tuple[int, ...]
    ridge: float
    error: float

    def describe(self) -> dict[str, Any]:
        """Plain data; JSON has no infinity, so an infinite ridge is None."""
        return {**asdict(self), "run": list(self.run), "ridge": None if math.isinf(self.ridge) else self.ridge}

    @staticmethod
    def read(facts: Mapping[str, Any]) -> Step:
        """Read what `describe` gave."""
        ridge = math.inf if facts["ridge"] is None else facts["ridge"]
        return Step(**{**facts, "run": tuple(facts["run"]), "ridge": ridge})


@dataclass(frozen=True)
class Losses:
    """Mean loss on held-out samples, nats per token: of the original, of the pruned model, and of the repaired one."""

    intact: float
    pruned: float
    repaired: float

    @property
    def delta_before(self) -> float:
        """Damage of the removal alone."""
        return self.pruned - self.intact

    @property
    def delta_after(self) -> float:
        """Damage of the removal, repaired."""
        return self.repaired - self.intact


@dataclass(frozen=True, eq=False)
class Repair:
    """Weights that make up for a removal.

    Attributes:
        removed: sorted original indices.
        weights: parameter name in the original model → its new value, in the parameter's own shape and dtype.
        steps: how each was fitted, in sequence.
        forward_tokens: cost of the fit, in tokens through the whole intact stack (a gradient counts as two passes).
        losses: on the held-out samples, where some were given.
        facts: hash of the model, samples and settings.

    """

    removed: tuple[int, ...]
    weights: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    forward_tokens: float
    losses: Losses | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        losses = self.losses and {
            **asdict(self.losses),
            "delta_before": self.losses.delta_before,
            "delta_after": self.losses.delta_after,
        }
        return {
            "removed": list(self.removed),
            "steps": [step.describe() for step in self.steps],
            "forward_tokens": self.forward_tokens,
            "losses": losses,
            **self.facts,
        }

    def save(self, path: str | Path) -> None:
        """Write as safetensors, atomically."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.weights.items()}
        metadata = {"format": FORMAT, "repair": json.dumps(self.describe())}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @staticmethod
    def load(path: str | Path) -> Repair:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or no repair in it.

        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path} holds no repair of excise")
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except FileNotFoundError:
            raise InputError(f"no repair file {path}") from None
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or not a safetensors file ({error})") from None
        facts = json.loads(metadata["repair"])
        steps = tuple(Step.read(step) for step in facts.pop("steps"))
        losses = facts.pop("losses")
        kept = losses and Losses(losses["intact"], losses["pruned"], losses["repaired"])
        removed = tuple(facts.pop("removed"))
        return Repair(removed, weights, steps, facts.pop("forward_tokens"), kept, facts)


def repair(
    stack: Stack,
    removed: Sequence[int],
    samples: Samples,
    *,
    held_out: Samples | None = None,
    into: Sequence[str] | None = None,
    features: str = "input",
    weighting: str = "uniform",
    ridges: Sequence[float] = RIDGES,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Repair:
    """Fit the repair of a removal; the model itself is left as it was.

    The original runs once over the samples for all cuts. The student runs from cut to cut: the streams wait on disk, so
    that memory holds one batch. Every fifth sample is kept out of the fit to choose the ridge, and joins it after.

    Args:
        stack: the original model.
        removed: original indices.
        samples: calibration samples, at least two.
        held_out: other samples on which the loss is measured, without removal, with it, and repaired.
        into: kinds of sublayers of the block below a cut to fold into, one after the other, each refitted on the
            stream that the one before it repaired. By default the last, which in a transformer is the feed-forward,
            as in ReplaceMe. Before a sequential
            feed-forward, "attention" is fitted as if the feed-forward did not react; what follows corrects that. It
            did not pay on the model measured here.
        features: "output" fits a map of the sublayer's output (width² numbers), as ReplaceMe does; "input" refits the
            whole matrix on its inputs (width × inner width), which did better on the model measured here, and whose
            normal equations need 16 bytes × inner width² of memory.
        weighting: what a token's error weighs, see `streams.original_streams`.
        ridges: strengths to choose from, relative to the features' mean square, each > 0; an infinite one stands for
            leaving the matrix alone.
        batch_tokens: padded tokens a batch.
        advance: called with the tokens of each batch, once for the original and once for each fitted matrix.

    Returns:
        New weights, to be used with `repaired`.

    Raises:
        InputError: an option is out of range, or there are fewer than two samples.
        ArchitectureError: folding would not be exact, or there is no kept block below a cut.

    """
    _check_options(samples, features, weighting, ridges)
    removed = block_indices(stack, removed)
    cuts = cuts_of(stack, removed)
    projections = output_projections(stack, [cut.kept for cut in cuts], into)
    batches = [b.to(stack.device) for b in make_batches(samples, batch_tokens or default_batch_tokens(stack))]
    tokens = sum(batch.tokens for batch in batches)
    n, report = len(stack.blocks), advance or (lambda _: None)
    tops = [cut.removed[-1] for cut in cuts]
    blocks_run = n + 2 * (n - tops[0]) if weighting == "gradient" else tops[-1] + 1
    weights: dict[str, Tensor] = {}
    steps = []
    with tempfile.TemporaryDirectory(prefix="excise-repair-") as place, contextlib.ExitStack() as folded:
        scratch = Scratch(Path(place))
        _keep_targets(stack, batches, tops, weighting, scratch, report)
        start = 0
        for projection in projections:
            cut = next(cut for cut in cuts if cut.kept == projection.sublayer.block)
            fit, choice = _gather(stack, batches, scratch, start, removed, projection, cut, features, report)
            blocks_run += sum(i not in removed for i in range(start, cut.kept + 1))
            errors = held_out_errors(fit, choice, ridges)
            best = min(range(len(ridges)), key=errors.__getitem__)
            new = _folded(projection, (fit + choice).solve(ridges[best]), features)
            folded.enter_context(swapped(stack.model, new))
            weights |= new
            steps.append(Step(cut.kept, projection.sublayer.kind, cut.removed, ridges[best], errors[best]))
            start = cut.kept
    facts = {
        "model_hash": model_hash(stack.model),
        "samples": samples.describe(),
        "settings": {"into": into and list(into), "features": features, "weighting": weighting},
    }
    result = Repair(removed, weights, tuple(steps), tokens * blocks_run / n, None, facts)
    return result if held_out is None else _judged(stack, result, held_out, batch_tokens)


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
    if repair.facts.get("model_hash") != model_hash(stack.model):
        raise InputError(
            "this repair was fitted on another model, or in another dtype; fit it anew, or load the model as it was"
        )
    with swapped(stack.model, repair.weights):
        yield repair.removed


def _check_options(samples: Samples, features: str, weighting: str, ridges: Sequence[float]) -> None:
    if features not in FEATURES or weighting not in WEIGHTINGS:
        raise InputError(
            f"expected features in {FEATURES} and weighting in {WEIGHTINGS}, got '{features}' and '{weighting}'"
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


def _judged(stack: Stack, fitted: Repair, held_out: Samples, batch_tokens: int | None) -> Repair:
    before = measure(stack, held_out, [(), fitted.removed], batch_tokens=batch_tokens)
    with swapped(stack.model, fitted.weights):
        after = measure(stack, held_out, [fitted.removed], batch_tokens=batch_tokens)
    losses = Losses(before.loss(), before.loss(fitted.removed), after.loss(fitted.removed))
    facts = {**fitted.facts, "held_out": held_out.describe()}
    return Repair(fitted.removed, fitted.weights, fitted.steps, fitted.forward_tokens, losses, facts)
