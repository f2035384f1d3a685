"""The walk with repair, block by block: every block is brought in once for all candidates and all samples."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from excise.interrupts import stop_if_told
from excise.ising.problem import Removal
from excise.measuring.divergence import Evaluation
from excise.measuring.sweep import Streams, Through, alone, embedded, finished
from excise.measuring.trie import Trie
from excise.repair.openings import Gains, Opening, closed, features_at, opening_of
from excise.repair.streams import recorded_at
from excise.repair.walk import Judging, trie_of

_Evaluations = Mapping[int, Evaluation]


@dataclass(frozen=True, eq=False)
class _Node:
    """Candidates that agree on all blocks so far.

    Attributes:
        members: which candidates; the first node's first is the intact model.
        streams: number under which their streams before the next block wait.
        opening: what the last kept block can add, where that may be.
        gap: whether a block was removed above that one.
        above: whether that one is the first above a cut.

    """

    members: list[int]
    streams: int
    opening: Opening | Gains | None = None
    gap: bool = False
    above: bool = False


class SweptWalk(Judging):
    """Breadth first: all candidates stand at the same depth."""

    def measured(self, removals: Sequence[Removal]) -> Iterator[tuple[Removal, np.ndarray]]:
        """Each removal with its sums [judging samples], once all have gone through the blocks."""
        with Streams() as streams:
            # The intact model goes along: it is what repairs aim at, and what distances are from.
            nodes = self._swept(trie_of(self.context.stack, [(), *removals]), streams)
            evaluations = self._evaluations(nodes[0], streams)
            for node in nodes:
                stop_if_told()
                sums = self._leaf(node, nodes[0], streams, evaluations)
                yield from ((removals[candidate - 1], sums) for candidate in node.members if candidate > 0)

    @torch.no_grad()
    def _swept(self, trie: Trie, streams: Streams) -> list[_Node]:
        """The nodes above all blocks."""
        stack, numbers = self.context.stack, itertools.count()
        nodes = [_Node(list(range(len(trie.off))), next(numbers))]
        for number, batch in enumerate(self.batches):
            streams.put((nodes[0].streams, number), embedded(stack, batch.input_ids))
        for block in range(len(stack.blocks)):
            above = self._level(trie, block, nodes, streams, numbers)
            for left in {node.streams for node in nodes} - {node.streams for node in above}:
                streams.drop(left)
            nodes = above
        return nodes

    def _level(
        self, trie: Trie, block: int, nodes: Sequence[_Node], streams: Streams, numbers: Iterator[int]
    ) -> list[_Node]:
        """The nodes above a block; the intact model stays in the first."""
        above: list[_Node] = []
        gone = trie.removed[:, block]
        with contextlib.nullcontext() if gone.all() else alone(self.context.stack, block) as through:
            for node in nodes:
                if keeping := [c for c in node.members if not gone[c]]:
                    assert through is not None
                    sent = self._sent(node, nodes[0], streams)
                    above.append(self._passed(trie, block, keeping, sent, streams, through, next(numbers), node.gap))
                if removing := [c for c in node.members if gone[c]]:
                    # A repair of the block below waits until it is known how high the cut reaches.
                    above.append(_Node(removing, node.streams, node.opening, gap=True))
        return above

    def _sent(self, node: _Node, intact: _Node, streams: Streams) -> Iterator[tuple[int, Tensor]]:
        """Numbers of batches with a node's streams as they enter a kept block: repaired next to a cut."""
        device = self.context.stack.device
        if node.opening is None or not (node.gap or node.above):
            waiting = (n for n in range(len(self.batches)) if (node.streams, n) in streams)
            yield from ((n, streams.get((node.streams, n), device)) for n in waiting)
            return
        yield from enumerate(
            closed(
                node.opening,
                self.batches,
                self.fits,
                lambda n: streams.get((node.streams, n), device),
                lambda n: streams.get((intact.streams, n), device)[self.batches[n].real],
            )
        )

    def _passed(
        self,
        trie: Trie,
        block: int,
        members: list[int],
        sent: Iterator[tuple[int, Tensor]],
        streams: Streams,
        through: Through,
        name: int,
        after_cut: bool,
    ) -> _Node:
        """Send a node's streams through a block, and record what a repair by it needs next to a cut."""
        above = trie.removed[members, block + 1 :]
        fold = self.folds.get(block) if after_cut or above[:, :1].any() else None
        # Of the intact model every cut that is open or to come wants the stream, and that after the block above it; of
        # others their own cuts only.
        fitting_on = after_cut or above.any() or (0 in members and trie.removed[:, max(block - 1, 0) :].any())
        features = []
        for number, stream in sent:
            stop_if_told()
            if self.fits[number] and not fitting_on:
                continue
            batch = self.batches[number]
            with recorded_at(fold) as found:
                streams.put((name, number), through(batch.input_ids, stream))
            if fold is not None:
                features.append(features_at(fold, found, batch))
        opening = None if fold is None else opening_of(fold, features, self.fits)
        return _Node(members, name, opening, above=after_cut)

    @torch.no_grad()
    def _evaluations(self, intact: _Node, streams: Streams) -> _Evaluations:
        device = self.context.stack.device

        def hidden_of(number: int) -> Tensor:
            stream = streams.get((intact.streams, number), device)
            return finished(self.context.stack, self.batches[number].input_ids, stream)

        return self.evaluations(hidden_of)

    @torch.no_grad()
    def _leaf(self, node: _Node, intact: _Node, streams: Streams, evaluations: _Evaluations) -> np.ndarray:
        """Sums [judging samples] of a node's candidates; with a large vocabulary the head takes its time."""
        after = dict(self._sent(node, intact, streams))
        return self.judged(after.__getitem__, evaluations)
