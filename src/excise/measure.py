"""Measured losses of many removals at once, evaluated along the trie of what they keep.

Candidates that keep and remove the same lowest blocks share the computation of those blocks: sorted by what they
keep, each candidate starts where it parts from the one before.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise.calibration.batches import Batch, default_batch_tokens, make_batches
from excise.calibration.samples import Samples
from excise.journal import Journal
from excise.losses import sample_losses
from excise.models.stack import Stack, block_indices, override_forward, pass_through
from excise.provenance import model_hash

Removal = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Measurements:
    """Negative log-likelihoods of removals on the same samples.

    Attributes:
        removals: [candidates], sorted original indices each; () is the intact model.
        sums: [candidates, samples], nats summed over the counted tokens; NaN or infinite where the model overflowed.
        counts: [samples], counted tokens.
        forward_tokens: cost, in tokens through the whole intact stack (blocks computed × tokens ÷ blocks).

    """

    removals: tuple[Removal, ...]
    sums: np.ndarray
    counts: np.ndarray
    forward_tokens: float

    @property
    def losses(self) -> np.ndarray:
        """Mean loss of each candidate [candidates], nats per token."""
        return self.sums.sum(axis=1) / self.counts.sum()

    def loss(self, removed: Sequence[int] = ()) -> float:
        """Mean loss of one candidate, nats per token."""
        return float(self.losses[self.removals.index(tuple(sorted(removed)))])


def measure(
    stack: Stack,
    samples: Samples,
    removals: Sequence[Sequence[int]],
    *,
    batch_tokens: int | None = None,
    journal: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Measurements:
    """Measure the loss of every removal on every sample.

    Args:
        stack: the model.
        samples: held-out samples.
        removals: block indices of each candidate; duplicates are measured once.
        batch_tokens: padded tokens a batch.
        journal: folder that makes the pass resumable.
        advance: called with tokens × candidates of each finished batch.

    Returns:
        Losses in the order of the distinct removals.

    """
    batch_tokens = batch_tokens or default_batch_tokens(stack.device)
    distinct = tuple(dict.fromkeys(block_indices(stack, removed) for removed in removals))
    batches = make_batches(samples, batch_tokens)
    facts = {"model_hash": model_hash(stack.model), "samples": samples.hash, "removals": distinct}
    record = Journal(journal, {"stage": "measure", **facts, "batch_tokens": batch_tokens})
    for number, batch in enumerate(batches):
        if number not in record:
            sums, counts, block_tokens = batch_losses(stack, batch, distinct)
            record.write(number, sums=sums, counts=counts, block_tokens=np.array([block_tokens]))
        if advance:
            advance(batch.tokens * len(distinct))
    pieces = [record.read(number) for number in range(len(batches))]
    order = np.argsort([i for batch in batches for i in batch.indices])
    return Measurements(
        distinct,
        np.concatenate([piece["sums"] for piece in pieces], axis=1)[:, order],
        np.concatenate([piece["counts"] for piece in pieces])[order],
        sum(int(piece["block_tokens"].sum()) for piece in pieces) / len(stack.blocks),
    )


@torch.no_grad()
def batch_losses(stack: Stack, batch: Batch, removals: Sequence[Removal]) -> tuple[np.ndarray, np.ndarray, int]:
    """Loss sums [candidates, batch], counts [batch] and block-tokens computed, for one batch.

    Block-tokens are the batch's real tokens times the blocks they went through.
    """
    batch = batch.to(stack.device)
    sums = np.zeros((len(removals), len(batch.indices)))
    counts = (batch.labels >= 0).sum(dim=1).cpu().numpy()
    blocks = 0
    for candidate, hidden, computed in _trie(stack, batch.input_ids, removals):
        sums[candidate] = sample_losses(stack, hidden, batch.labels).sums.double().cpu().numpy()
        blocks += computed
    return sums, counts, blocks * batch.tokens


def _trie(stack: Stack, input_ids: Tensor, removals: Sequence[Removal]) -> Iterator[tuple[int, Tensor, int]]:
    """Final hidden states of each candidate, depth first, with the number of blocks that had to be computed."""
    n = len(stack.blocks)
    masks = [np.isin(np.arange(n), removed) for removed in removals]
    order = sorted(range(len(removals)), key=lambda i: tuple(masks[i]))
    starts = [0] + [_first_difference(masks[a], masks[b]) for a, b in itertools.pairwise(order)]
    saved: dict[int, Tensor] = {}
    for place, candidate in enumerate(order):
        start = starts[place]
        saved = {depth: hidden for depth, hidden in saved.items() if depth <= start}
        wanted = _branch_points(starts, place)
        with _path(stack, masks[candidate], start, saved, wanted):
            hidden = stack.hidden(input_ids)
        yield candidate, hidden, int((~masks[candidate][start:]).sum())


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.argmax(a != b))


def _branch_points(starts: Sequence[int], place: int) -> set[int]:
    """Depths at which later candidates will part from the path of the one at `place`."""
    points: set[int] = set()
    lowest = sys.maxsize
    for start in starts[place + 1 :]:
        lowest = min(lowest, start)
        if lowest < starts[place]:
            break
        points.add(lowest)
    return points


@contextlib.contextmanager
def _path(stack: Stack, removed: np.ndarray, start: int, saved: dict[int, Tensor], wanted: set[int]) -> Iterator[None]:
    """Context in which the stack resumes at block `start` from `saved[start]`, skipping `removed`, filling `saved`."""
    replacements: dict[Any, Callable[..., Any]] = {b.module: pass_through for b in stack.blocks if b.index < start}
    replacements |= {b.module: pass_through for b in stack.blocks[start:] if removed[b.index]}
    if start > 0:
        replacements[stack.blocks[start - 1].module] = lambda *_, **__: saved[start]

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            saved[depth] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [
        stack.blocks[depth].module.register_forward_pre_hook(keep(depth), with_kwargs=True)
        for depth in wanted
        if depth not in saved
    ]
    try:
        with override_forward(replacements):
            yield
    finally:
        for handle in handles:
            handle.remove()
