"""The trie of what candidates keep: those that agree on the lowest blocks share the computation of those."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from excise.data.batches import Batch
from excise.measuring.sweep import Streams, Through, alone, embedded, finished
from excise.models.stack import Block, Stack, block_input, block_output, override_forward, pass_through, silent
from excise.plain import Facts

Off = tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Trie:
    """Candidates in the order in which they share most, and where each parts from the one before it.

    Attributes:
        stack: the model.
        off: [candidates, gates], the sublayers that add nothing.
        removed: [candidates, blocks], the blocks that are passed over.
        order: candidates, depth first.
        starts: for each place in `order`, the first block that differs from the candidate before.

    """

    stack: Stack
    off: Bool[np.ndarray, "candidates gates"]
    removed: Bool[np.ndarray, "candidates blocks"]
    order: tuple[int, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(stack: Stack, off: Bool[np.ndarray, "candidates gates"]) -> Trie:
        """Plan the walk for candidates given by the sublayers [candidates, gates] that are off."""
        states = [_block_states(stack, gates) for gates in off]
        # A block that others depend on runs even where all its sublayers are off.
        gone = [[all(block) and i not in stack.fixed for i, block in enumerate(states)] for states in states]
        # Sorted by what they keep, neighbours share their longest common beginning, as in a trie walked depth first.
        order = sorted(range(len(states)), key=lambda i: states[i])
        starts = [0] + [_first_difference(states[a], states[b]) for a, b in itertools.pairwise(order)]
        if stack.shares_kv:
            # Blocks above a branching point may need keys and values from below it, which the stream does not carry.
            starts = [0] * len(order)
        removed = np.array(gone, dtype=bool).reshape(len(states), len(stack.blocks))
        return Trie(stack, off, removed, tuple(order), tuple(starts))

    @property
    def computed(self) -> Int[np.ndarray, " candidates"]:
        """Blocks [candidates] computed for each; what candidates share counts for the first of them."""
        blocks = np.zeros(len(self.order), dtype=np.int64)
        for candidate, start in zip(self.order, self.starts, strict=True):
            # Sublayers that are off in a block that stays are computed all the same, and cost what they cost intact.
            blocks[candidate] = (~self.removed[candidate][start:]).sum()
        return blocks

    def hidden(self, input_ids: Int[Tensor, "batch tokens"]) -> Iterator[tuple[int, Tensor]]:
        """Each candidate with its final hidden states [batch, tokens, width], depth first."""
        # A removed block's own sublayers never run, so only those of blocks that stay need silencing.
        owners = [sublayer.block for sublayer in self.stack.sublayers]
        # Depth first, so that no more streams are alive than the path has branching points.
        saved: dict[int, Tensor] = {}
        for place, candidate in enumerate(self.order):
            start, removed = self.starts[place], self.removed[candidate]
            # Streams above the branching point belong to a branch that no later candidate returns to.
            saved = {depth: stream for depth, stream in saved.items() if depth <= start}
            wanted = branch_points(self.starts, place)
            with (
                _path(self.stack, removed, start, saved, wanted),
                silent(self.stack, self.off[candidate] & ~removed[owners]),
            ):
                hidden = self.stack.hidden(input_ids)
            yield candidate, hidden

    def swept(
        self, batches: Mapping[int, Batch], streams: Streams, advance: Callable[[int], object]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The same for many batches, every block brought in once: (batch, candidate, hidden states).

        Args:
            batches: by number, on the model's device.
            streams: where the residual streams wait between blocks.
            advance: called with the number of each block once all batches are through it.

        """
        for number, batch in batches.items():
            streams.put((0, number), embedded(self.stack, batch.input_ids))
        nodes = [list(range(len(self.off)))]
        for block in self.stack.blocks:
            steps = self._steps(block, nodes)
            with alone(self.stack, block.index) if any(step.runs for step in steps) else _nothing() as through:
                for number, batch in batches.items():
                    self._step(steps, number, batch, streams, through)
            nodes = [step.members for step in steps]
            advance(block.index)
        for number, batch in batches.items():
            for node, members in enumerate(nodes):
                stream = streams.take((node, number), batch.input_ids.device)
                hidden = finished(self.stack, batch.input_ids, stream)
                yield from ((number, candidate, hidden) for candidate in members)

    def _steps(self, block: Block, nodes: Sequence[Sequence[int]]) -> list[_Step]:
        """Where the candidates of each node go at a block: those that treat it alike stay together."""
        gates = [sublayer.gate for sublayer in block.sublayers]
        steps = []
        for node, members in enumerate(nodes):
            groups: dict[Off, list[int]] = {}
            for candidate in members:
                groups.setdefault(tuple(self.off[candidate, gates].tolist()), []).append(candidate)
            steps += [
                _Step(node, group, not self.removed[group[0], block.index], np.array(off), gates)
                for off, group in groups.items()
            ]
        return steps

    def _step(
        self, steps: Sequence[_Step], number: int, batch: Batch, streams: Streams, through: Through | None
    ) -> None:
        """Send the streams of one batch through a block."""
        device = batch.input_ids.device
        nodes = dict.fromkeys(step.node for step in steps)
        before = {node: streams.take((node, number), device) for node in nodes}
        for child, step in enumerate(steps):
            stream = before[step.node]
            if step.runs:
                assert through is not None
                with silent(self.stack, step.silenced(len(self.stack.sublayers))):
                    stream = through(batch.input_ids, stream)
            streams.put((child, number), stream)


@dataclass(frozen=True, eq=False)
class _Step:
    """What a block does to the stream of a node, for the candidates that treat the block alike."""

    node: int
    members: list[int]
    runs: bool
    off: NDArray[np.bool_]
    gates: list[int]

    def silenced(self, gates: int) -> NDArray[np.bool_]:
        """Mask [gates] of the sublayers that run but add nothing."""
        mask = np.zeros(gates, dtype=bool)
        mask[self.gates] = self.off
        return mask


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _block_states(stack: Stack, off: NDArray[np.bool_]) -> list[Off]:
    """Which sublayers of each block are off."""
    return [tuple(bool(off[sublayer.gate]) for sublayer in block.sublayers) for block in stack.blocks]


def _first_difference(a: Sequence[Off], b: Sequence[Off]) -> int:
    # Equal neighbours, which `measure` takes out beforehand, would start at 0: dear, but right.
    return next((depth for depth, (left, right) in enumerate(zip(a, b, strict=True)) if left != right), 0)


def branch_points(starts: Sequence[int], place: int) -> set[int]:
    """Depths at which later candidates will part from the path of the one at `place`."""
    points: set[int] = set()
    lowest = sys.maxsize
    for start in starts[place + 1 :]:
        # The path at a depth is still this one's only while nothing in between parted below it: hence the running
        # minimum.
        lowest = min(lowest, start)
        # From here on branches begin below where this one did, from streams that an earlier candidate left.
        if lowest < starts[place]:
            break
        points.add(lowest)
    return points


@contextlib.contextmanager
def _path(
    stack: Stack, removed: NDArray[np.bool_], start: int, saved: dict[int, Tensor], wanted: set[int]
) -> Iterator[None]:
    """Context in which the stack resumes at block `start` from `saved[start]`, skipping `removed`, filling `saved`."""
    through = pass_through(stack)
    # Bypassed rather than cut out: every block keeps its index, by which transformers picks its mask (full or sliding).
    replacements: dict[Any, Callable[..., Any]] = {b.module: through for b in stack.blocks if b.index < start}
    replacements |= {b.module: through for b in stack.blocks[start:] if removed[b.index]}
    if start > 0:
        # The model's own forward still runs from its embedding, for masks and positions; only the stream is replaced.
        replacements[stack.blocks[start - 1].module] = lambda *_, **__: block_output(stack, saved[start])

    def keep(depth: int) -> Callable[..., None]:
        # On the way in, which fires even where the block is passed over: what is replaced is its forward, not its call.
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: Facts) -> None:
            saved[depth] = block_input(args, kwargs)

        return hook

    handles = [
        stack.blocks[depth].module.register_forward_pre_hook(keep(depth), with_kwargs=True)
        for depth in wanted
        # What an earlier candidate saved below the branching point is the same stream.
        if depth not in saved
    ]
    try:
        with override_forward(replacements):
            yield
    finally:
        for handle in handles:
            handle.remove()
