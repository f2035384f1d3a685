"""Damage after repair, measured along the trie of what removals keep.

A repair at a cut depends only on what lies below it, so candidates that agree on the lowest blocks share it as they
share the computation of these blocks. Every node holds the streams of all samples. Where a run of removed blocks ends,
the matrix below it is refitted on the fitting samples, towards the original's stream there, and all samples go on with
the stream as that matrix makes it; the damage is measured on the judging samples alone. No weight is changed: the
effect of a refitted matrix on the stream is added to the stream.

With fewer fitting tokens than features, the fit is solved in its dual form, whose matrices are tokens × tokens:
Φ D = K (K_fit + ridge·s)⁻¹ R, with K = Φ Φ_fitᵀ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import ArchitectureError
from excise.interrupts import stop_if_told
from excise.ising.problem import Removal
from excise.measuring.divergence import Divergence
from excise.measuring.losses import sample_losses
from excise.measuring.measure import Measurements, Statistic, measure
from excise.measuring.passes import over_batches, pass_key
from excise.measuring.trie import Trie, branch_points
from excise.models.stack import Stack, block_input, removable_indices
from excise.repair.cuts import folds_of
from excise.repair.folds import AUTO, Fold, Gain, as_features
from excise.repair.streams import Scratch, original_streams, recorded_at, recorded_streams, run_blocks, wide
from excise.store import Ledger

# Of a fit on one to three thousand tokens. Chosen once for all, as held-out samples would have to choose it at every
# cut of every candidate.
RIDGE = 0.3
MEASUREMENTS, STAGE = "repaired", "measuring, repaired"
# Intact probabilities kept over all judging batches (1 GiB of float32).
KEPT_ELEMENTS = 1 << 28


def repairable_folds(stack: Stack) -> dict[int, Fold]:
    """What of a block below a cut a repair folds into, for every block where it does; costs a pass of a few tokens."""
    found = folds_of(stack, range(len(stack.blocks) - 1), None)
    return {block: folds[0] for block, folds in found.items() if not isinstance(folds, ArchitectureError)}


def known_repaired(context: Context, fitting: Samples, judging: Samples, statistic: Statistic) -> tuple[Removal, ...]:
    """Removals that the store holds already; arguments as for `measure_repaired`."""
    return tuple(_ledger(context, fitting, judging, statistic))


def measure_repaired(
    context: Context,
    fitting: Samples,
    judging: Samples,
    removals: Sequence[Sequence[int]],
    *,
    statistic: Statistic = "loss",
) -> Measurements:
    """Measure removals of whole blocks on samples, each repaired on others.

    Cuts below which nothing can be refitted exactly stay as they are; where that is so of all, this is `measure`. What
    the store holds is not measured again, and every candidate is kept as soon as it is measured.

    Args:
        context: the model and the store.
        fitting: samples on which repairs are fitted.
        judging: samples on which damage is measured.
        removals: block indices of each candidate; duplicates are measured once.
        statistic: see `excise.measuring.measure.measure`.

    Returns:
        Of `judging`, in the order of the distinct removals. Costs are those of both kinds of samples.

    Raises:
        InputError: a block index does not fit the stack.
        ArchitectureError: a block that others depend on is to be removed.

    """
    stack = context.stack
    distinct = tuple(dict.fromkeys(removable_indices(stack, removed) for removed in removals))
    known = _ledger(context, fitting, judging, statistic)
    new = [removed for removed in distinct if removed not in known]
    # Asked only where something is to be measured: searches ask again and again for what is known.
    folds = repairable_folds(stack) if new else {}
    if new and not folds:
        return measure(context, judging, removals, statistic=statistic)
    with context.progress.stage(STAGE, judging.tokens * len(distinct)) as advance:
        if len(new) < len(distinct):
            advance(judging.tokens * (len(distinct) - len(new)))
        if new:
            with tempfile.TemporaryDirectory(prefix="excise-streams-") as place:
                walk = _Walk(context, fitting, judging, statistic, folds, Scratch(Path(place)))
                for removed, sums in walk.measured(new):
                    known.add([removed], sums[None])
                    advance(judging.tokens)
    trie = _trie(stack, distinct)
    return Measurements(
        distinct,
        np.array([known[removed] for removed in distinct]),
        np.array([sample.targets for sample in judging]),
        _costs(trie, fitting.tokens, judging.tokens) / len(stack.blocks),
    )


def _ledger(context: Context, fitting: Samples, judging: Samples, statistic: Statistic) -> Ledger:
    key = {**pass_key(context, judging, {}), "fitting": fitting.hash, "statistic": statistic, "ridge": RIDGE}
    return context.store.ledger(MEASUREMENTS, key)


def _trie(stack: Stack, removals: Sequence[Removal]) -> Trie:
    owners = [sublayer.block for sublayer in stack.sublayers]
    return Trie.of(stack, np.array([np.isin(owners, removed) for removed in removals]).reshape(len(removals), -1))


def _costs(trie: Trie, fitting: int, judging: int) -> np.ndarray:
    """Tokens × blocks [candidates]: the fitting samples need no more than what lies below the highest cut."""
    costs = np.zeros(len(trie.order))
    for candidate, start in zip(trie.order, trie.starts, strict=True):
        kept = ~trie.removed[candidate]
        top = np.flatnonzero(trie.removed[candidate])[-1] if trie.removed[candidate].any() else 0
        costs[candidate] = judging * kept[start:].sum() + fitting * kept[start:top].sum()
    return costs


@dataclass(frozen=True, eq=False)
class _Node:
    """The streams of all batches before a block; with what is needed to repair the block below, where that may be."""

    streams: tuple[Tensor, ...]
    opening: _Opening | _Gains | None = None


class _Opening:
    """A kept block below a cut, however high the cut will reach: what its matrix can add to the streams.

    Args:
        features: [real tokens of a batch, features] of each batch.
        fits: which batches are fitted on.

    """

    def __init__(self, features: Sequence[Tensor], fits: Sequence[bool]) -> None:
        phi = torch.cat([f for f, fitting in zip(features, fits, strict=True) if fitting])
        # With fewer tokens than features, in tokens: features need not be kept, however wide they are.
        dual = phi.shape[0] < phi.shape[1]
        gram = phi @ phi.T if dual else phi.T @ phi
        # As in `NormalEquations`, the ridge is relative to the mean diagonal of ΦᵀΦ, whatever the form.
        scale = float(phi.square().sum()) / phi.shape[1]
        gram.diagonal().add_(max(RIDGE * scale, torch.finfo(gram.dtype).tiny))
        self._factor = torch.linalg.cholesky(gram)
        self._fitted = None if dual else phi
        self._rows = [f @ phi.T for f in features] if dual else list(features)

    def added(self, residual: Float[Tensor, "tokens width"]) -> list[Tensor]:
        """What the refitted matrix adds [real tokens, width] to each batch.

        Args:
            residual: [tokens, width], what is missing in the streams of the batches fitted on.

        """
        right = residual if self._fitted is None else self._fitted.T @ residual
        solution = torch.cholesky_solve(right, self._factor)
        return [rows @ solution for rows in self._rows]


class _Gains:
    """The same for a fold that only scales channels.

    Args:
        features: [real tokens of a batch, width] of each batch.
        fits: which batches are fitted on.

    """

    def __init__(self, features: Sequence[Tensor], fits: Sequence[bool]) -> None:
        self._features = features
        self._fitted = torch.cat([f for f, fitting in zip(features, fits, strict=True) if fitting])

    def added(self, residual: Float[Tensor, "tokens width"]) -> list[Tensor]:
        """See `_Opening.added`."""
        gram = self._fitted.square().sum(dim=0)
        ridge = RIDGE * float(gram.mean())
        change = (self._fitted * residual).sum(dim=0) / (gram + max(ridge, torch.finfo(gram.dtype).tiny))
        return [f * change for f in self._features]


class _Walk:
    """One walk over the trie with the streams of all samples, the fitting ones first."""

    def __init__(
        self,
        context: Context,
        fitting: Samples,
        judging: Samples,
        statistic: Statistic,
        folds: Mapping[int, Fold],
        scratch: Scratch,
    ) -> None:
        of_fitting, of_judging = context.batches(fitting), context.batches(judging)
        self.context, self.fitting, self.judging = context, fitting, judging
        self.statistic, self.scratch = statistic, scratch
        self.batches = [batch.to(context.stack.device) for batch in (*of_fitting, *of_judging)]
        self.fits = [i < len(of_fitting) for i in range(len(self.batches))]
        self.folds = folds

    def measured(self, removals: Sequence[Removal]) -> Iterator[tuple[Removal, np.ndarray]]:
        """Each removal with its sums [judging samples], depth first."""
        stack = self.context.stack
        trie = _trie(stack, removals)
        self._keep_targets(trie)
        evaluations = self._evaluations()
        with torch.no_grad():
            saved = {0: _Node(tuple(_before(stack, batch) for batch in self.batches))}
        for place, candidate in enumerate(trie.order):
            start, removed = trie.starts[place], trie.removed[candidate]
            saved = {depth: node for depth, node in saved.items() if depth <= start}
            wanted = branch_points(trie.starts, place)
            # Not around the whole: between two candidates whoever asked for them does what he likes.
            with torch.no_grad():
                node = self._followed(saved[start], start, removed, wanted, saved)
                sums = self._judged(node, evaluations)
            yield removals[candidate], sums

    def _followed(
        self, node: _Node, start: int, removed: np.ndarray, wanted: set[int], saved: dict[int, _Node]
    ) -> _Node:
        """The node above all blocks, on one candidate's path from `start`; fills `saved` at the depths wanted."""
        depth, blocks = start, len(removed)
        while depth < blocks:
            stop = depth + 1
            if not removed[depth]:
                if depth > 0 and removed[depth - 1]:
                    node = self._closed(node, depth - 1)
                while stop < blocks and not removed[stop] and stop not in wanted:
                    stop += 1
                opens = stop < blocks and (removed[stop] or stop in wanted)
                fitting_on = bool(removed[stop:].any()) or any(branch >= stop for branch in wanted)
                node = self._run(node, depth, stop, opens, fitting_on)
            if stop in wanted and stop not in saved:
                saved[stop] = node
            depth = stop
        return self._closed(node, blocks - 1) if removed[-1] else node

    def _run(self, node: _Node, start: int, stop: int, opens: bool, fitting_on: bool) -> _Node:
        """Send the streams through blocks `start` to `stop` − 1, recording what a repair of the last of them needs."""
        fold = self.folds.get(stop - 1) if opens else None
        streams: list[Tensor] = []
        features: list[Tensor] = []
        for number, batch in enumerate(self.batches):
            stop_if_told()
            stream = node.streams[number]
            if self.fits[number] and not fitting_on:
                # No cut lies above: what is fitted on is of no more use.
                streams.append(stream)
                continue
            with recorded_at(fold) as found:
                streams.append(_through(self.context.stack, batch, stream, start, stop))
            if fold is not None:
                features.append(wide(as_features(found, fold.features(AUTO))[batch.real]))
        if fold is None or not features:
            return _Node(tuple(streams))
        opening = _Gains if isinstance(fold, Gain) else _Opening
        return _Node(tuple(streams), opening(features, self.fits))

    def _closed(self, node: _Node, top: int) -> _Node:
        """The node after a cut whose highest block is `top`, repaired where that is exact."""
        if node.opening is None:
            return node
        missing = []
        for number, batch in enumerate(self.batches):
            if self.fits[number]:
                stream = node.streams[number][batch.real]
                target = self.scratch.read(number, f"target-{top}")["stream"].to(stream.device)
                missing.append(wide(target) - wide(stream))
        streams = []
        for stream, batch, added in zip(
            node.streams, self.batches, node.opening.added(torch.cat(missing)), strict=True
        ):
            repaired = stream.clone()
            repaired[batch.real] = (wide(stream[batch.real]) + added).to(stream.dtype)
            streams.append(repaired)
        return _Node(tuple(streams))

    def _keep_targets(self, trie: Trie) -> None:
        """Write the original's streams of the fitting samples after every block in which a cut may end."""
        gone, blocks = trie.removed, trie.removed.shape[1]
        ends = [d for d in range(blocks) if (gone[:, d] & (~gone[:, d + 1] if d + 1 < blocks else True)).any()]
        if not ends:
            return
        for number, batch in over_batches(self.context, self.fitting, "targets"):
            streams, _ = original_streams(self.context.stack, batch, ends, "uniform")
            for end, stream in streams.items():
                self.scratch.write(number, f"target-{end}", {"stream": stream[batch.real.to(stream.device)]})

    def _evaluations(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """Number of each judging batch → function from final hidden states to sums [batch]."""
        stack, judged = self.context.stack, {n: b for n, b in enumerate(self.batches) if not self.fits[n]}
        if self.statistic == "loss":
            return {
                n: lambda hidden, labels=batch.labels: sample_losses(stack, hidden, labels).sums  # type: ignore[misc]
                for n, batch in judged.items()
            }
        keep = KEPT_ELEMENTS // max(1, len(judged))
        return {n: Divergence(stack, batch.input_ids, batch.labels, keep=keep) for n, batch in judged.items()}

    def _judged(self, node: _Node, evaluations: Mapping[int, Callable[[Tensor], Tensor]]) -> np.ndarray:
        """Sums [judging samples] of a candidate whose streams have passed all blocks."""
        sums = np.zeros(len(self.judging))
        for number, evaluate in evaluations.items():
            batch = self.batches[number]
            sums[list(batch.indices)] = evaluate(self._final(node, number)).double().cpu().numpy()
        return sums

    def _final(self, node: _Node, number: int) -> Tensor:
        """Final hidden states of a batch."""
        stack = self.context.stack
        return run_blocks(stack, self.batches[number], len(stack.blocks), len(stack.blocks), node.streams[number])


def _before(stack: Stack, batch: Batch) -> Tensor:
    """The stream [batch, tokens, width] before the first block."""
    kept: list[Tensor] = []
    block = stack.blocks[0].module
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(block_input(args, kwargs)), with_kwargs=True
    )
    try:
        run_blocks(stack, batch, 0, 0, None)
    finally:
        handle.remove()
    return kept[0]


def _through(stack: Stack, batch: Batch, stream: Tensor, start: int, stop: int) -> Tensor:
    """The stream [batch, tokens, width] after block `stop` − 1."""
    with recorded_streams(stack, [stop - 1]) as streams:
        run_blocks(stack, batch, start, stop, stream)
    return streams[stop - 1]
