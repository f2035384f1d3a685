"""The trie of what candidates keep: those that agree on the lowest blocks share the computation of those."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from excise.models.stack import Stack, block_input, block_output, override_forward, pass_through, silent
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
        if stack.architecture.kv_sharing:
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
