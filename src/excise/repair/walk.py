"""Walks over the trie of what removals keep, with the streams of all samples, repairing at every cut on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.interrupts import stop_if_told
from excise.ising.problem import Removal
from excise.measuring.divergence import (
    Divergence,
    Evaluation,
    Losses,
    counted_positions,
    distribution_facts,
    told_apart,
)
from excise.measuring.measure import Statistic
from excise.measuring.passes import over_batches
from excise.measuring.sweep import embedded, finished, run_blocks
from excise.measuring.trie import Trie, branch_points
from excise.models.stack import Stack
from excise.plain import Facts
from excise.repair.folds import Fold
from excise.repair.openings import Gains, Opening, closed, features_at, opening_of
from excise.repair.streams import Scratch, original_streams, recorded_at, recorded_streams


def trie_of(stack: Stack, removals: Sequence[Removal]) -> Trie:
    """The trie of removals of whole blocks."""
    owners = [sublayer.block for sublayer in stack.sublayers]
    return Trie.of(stack, np.array([np.isin(owners, removed) for removed in removals]).reshape(len(removals), -1))


class Judging:
    """All batches, those that repairs are fitted on first, and how candidates are judged on the others.

    Args:
        context: the model.
        fitting: samples on which repairs are fitted.
        judging: samples on which damage is measured.
        statistic: see `excise.measuring.measure.measure`.
        folds: by block, what its repair folds into.

    Attributes:
        distributions: see `excise.measuring.measure.Measurements`; empty until divergences were taken.

    """

    def __init__(
        self,
        context: Context,
        fitting: Samples,
        judging: Samples,
        statistic: Statistic,
        folds: Mapping[int, Fold],
    ) -> None:
        of_fitting, of_judging = context.batches(fitting), context.batches(judging)
        self.context, self.fitting, self.judging = context, fitting, judging
        self.statistic, self.folds = statistic, folds
        self.distributions: Facts = {}
        self.batches = [batch.to(context.stack.device) for batch in (*of_fitting, *of_judging)]
        self.fits = [i < len(of_fitting) for i in range(len(self.batches))]

    def evaluations(self, hidden_of: Callable[[int], Tensor] | None = None) -> dict[int, Evaluation]:
        """Number of each judging batch → how candidates are judged on it.

        Args:
            hidden_of: number of a batch → final hidden states of the intact model; None runs it where they are needed.

        """
        stack, judged = self.context.stack, {n: b for n, b in enumerate(self.batches) if not self.fits[n]}
        if self.statistic == "loss":
            return {n: Losses(stack, batch.labels) for n, batch in judged.items()}
        top_k = told_apart(self.context, judged.values())
        found: dict[int, Evaluation] = {}
        for n, batch in judged.items():
            hidden = None if hidden_of is None else hidden_of(n)
            ids, labels = batch.input_ids, batch.labels
            found[n] = Divergence(stack, ids, labels, hidden=hidden, distance=self.statistic, top_k=top_k)
        rest = sum(float(each.rest.sum()) for each in found.values())
        self.distributions = distribution_facts(top_k, rest, sum(map(counted_positions, judged.values())))
        return found

    def judged(self, stream_of: Callable[[int], Tensor], evaluations: Mapping[int, Evaluation]) -> np.ndarray:
        """Sums [judging samples] of a candidate.

        Args:
            stream_of: number of a batch → its residual stream [batch, tokens, width] after all blocks.
            evaluations: as above.

        """
        sums = np.zeros(len(self.judging))
        for number, evaluate in evaluations.items():
            batch = self.batches[number]
            hidden = finished(self.context.stack, batch.input_ids, stream_of(number))
            sums[list(batch.indices)] = evaluate(hidden).double().cpu().numpy()
        return sums


@dataclass(frozen=True, eq=False)
class _Node:
    """The streams of all batches before a block; with what the last block that was kept can add, where that may be."""

    streams: tuple[Tensor, ...]
    opening: Opening | Gains | None = None


class Walk(Judging):
    """Depth first: a candidate after the other, each from where it parts from the one before."""

    def measured(self, removals: Sequence[Removal]) -> Iterator[tuple[Removal, np.ndarray]]:
        """Each removal with its sums [judging samples], depth first."""
        stack = self.context.stack
        trie = trie_of(stack, removals)
        with tempfile.TemporaryDirectory(prefix="excise-streams-") as place:
            self.scratch = Scratch(Path(place))
            self._keep_targets(trie)
            yield from self._walked(trie, removals)

    def _walked(self, trie: Trie, removals: Sequence[Removal]) -> Iterator[tuple[Removal, np.ndarray]]:
        stack, evaluations = self.context.stack, self.evaluations()
        with torch.no_grad():
            saved = {0: _Node(tuple(embedded(stack, batch.input_ids) for batch in self.batches))}
        for place, candidate in enumerate(trie.order):
            start, removed = trie.starts[place], trie.removed[candidate]
            saved = {depth: node for depth, node in saved.items() if depth <= start}
            wanted = branch_points(trie.starts, place)
            # Not around the whole: between two candidates whoever asked for them does what he likes.
            with torch.no_grad():
                node = self._followed(saved[start], start, removed, wanted, saved)
                sums = self.judged(node.streams.__getitem__, evaluations)
            yield removals[candidate], sums

    def _followed(
        self, node: _Node, start: int, removed: np.ndarray, wanted: set[int], saved: dict[int, _Node]
    ) -> _Node:
        """The node above all blocks, on one candidate's path from `start`; fills `saved` at the depths wanted."""
        depth, blocks = start, len(removed)
        while depth < blocks:
            stop = depth + 1
            if not removed[depth]:
                node = self._mended(node, depth, removed)
                # The block above a cut goes by itself, as it is refitted too.
                above = depth > 0 and removed[depth - 1]
                while not above and stop < blocks and not removed[stop] and stop not in wanted:
                    stop += 1
                opens = above or (stop < blocks and (removed[stop] or stop in wanted))
                fitting_on = above or bool(removed[stop:].any()) or any(branch >= stop for branch in wanted)
                node = self._run(node, depth, stop, opens, fitting_on)
            if stop in wanted and stop not in saved:
                saved[stop] = node
            depth = stop
        return self._mended(node, blocks, removed)

    def _mended(self, node: _Node, depth: int, removed: np.ndarray) -> _Node:
        """The node before a kept block, or above all blocks: repaired after a cut, and after the block above it."""
        return self._closed(node, depth - 1) if removed[max(0, depth - 2) : depth].any() else node

    def _run(self, node: _Node, start: int, stop: int, opens: bool, fitting_on: bool) -> _Node:
        """Send the streams through blocks `start` to `stop` − 1, recording what a repair by the last of them needs."""
        fold = self.folds.get(stop - 1) if opens else None
        streams: list[Tensor] = []
        features: list[Tensor] = []
        for number, batch in enumerate(self.batches):
            stop_if_told()
            stream = node.streams[number]
            if self.fits[number] and not fitting_on:
                # Nothing above is repaired: what is fitted on is of no more use.
                streams.append(stream)
                continue
            with recorded_at(fold) as found:
                streams.append(_through(self.context.stack, batch, stream, start, stop))
            if fold is not None:
                features.append(features_at(fold, found, batch))
        if fold is None or not features:
            return _Node(tuple(streams))
        return _Node(tuple(streams), opening_of(fold, features, self.fits))

    def _closed(self, node: _Node, top: int) -> _Node:
        """The node after block `top`, with the original's stream there as the aim of a repair, where that is exact."""
        if node.opening is None:
            return node
        return _Node(
            tuple(
                closed(
                    node.opening,
                    self.batches,
                    self.fits,
                    node.streams.__getitem__,
                    lambda number: self.scratch.read(number, f"target-{top}")["stream"],
                )
            )
        )

    def _keep_targets(self, trie: Trie) -> None:
        """Write the original's streams of the fitting samples after every block where a cut may end, and the next."""
        gone, blocks = trie.removed, trie.removed.shape[1]
        tops = [d for d in range(blocks) if (gone[:, d] & (~gone[:, d + 1] if d + 1 < blocks else True)).any()]
        ends = sorted({*tops, *(top + 1 for top in tops if top + 1 < blocks)})
        if not ends:
            return
        for number, batch in over_batches(self.context, self.fitting, "targets"):
            streams, _ = original_streams(self.context.stack, batch, ends, "uniform")
            for end, stream in streams.items():
                self.scratch.write(number, f"target-{end}", {"stream": stream[batch.real.to(stream.device)]})


def _through(stack: Stack, batch: Batch, stream: Tensor, start: int, stop: int) -> Tensor:
    """The stream [batch, tokens, width] after block `stop` − 1."""
    with recorded_streams(stack, [stop - 1]) as streams:
        run_blocks(stack, batch.input_ids, start, stop, stream)
    return streams[stop - 1]
