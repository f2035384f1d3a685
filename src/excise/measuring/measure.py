"""Measured losses of many removals at once, evaluated along the trie of what they keep.

Candidates that keep and remove the same lowest blocks share the computation of those blocks: sorted by what they
keep, each candidate starts where it parts from the one before. A candidate removes whole blocks, or single sublayers.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from excise.data.batches import default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.errors import InputError
from excise.measuring.divergence import INTACT, Divergence
from excise.measuring.journal import Journal
from excise.measuring.ledger import Ledger, Removal
from excise.measuring.losses import sample_losses
from excise.models.identity import model_identity
from excise.models.stack import (
    Stack,
    block_input,
    block_output,
    override_forward,
    pass_through,
    removable_indices,
    silent,
)

Statistic = Literal["loss", "divergence"]


@dataclass(frozen=True, eq=False)
class Measurements:
    """Negative log-likelihoods (or divergences from the intact model) of removals on the same samples.

    Attributes:
        removals: [candidates], sorted original indices each, of blocks or of sublayers; () is the intact model.
        sums: [candidates, samples], nats summed over the counted tokens; NaN or infinite where the model overflowed.
        counts: [samples], counted tokens.
        costs: [candidates], tokens through the whole intact stack (blocks computed × tokens ÷ blocks); what candidates
            share is the cost of the first of them. The one pass of the intact model that divergences on some samples
            take is not among them.

    """

    removals: tuple[Removal, ...]
    sums: np.ndarray
    counts: np.ndarray
    costs: np.ndarray

    @property
    def forward_tokens(self) -> float:
        """Cost of all, in tokens through the whole intact stack."""
        return float(self.costs.sum())

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
    sublayers: bool = False,
    statistic: Statistic = "loss",
    batch_tokens: int | None = None,
    ledger: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Measurements:
    """Measure the loss of every removal on every sample.

    Args:
        stack: the model.
        samples: held-out samples.
        removals: block indices of each candidate; duplicates are measured once.
        sublayers: `removals` are gate indices instead: those sublayers add nothing to the residual stream.
        statistic: "loss", the cross-entropy of the next token; or "divergence", KL(intact ‖ pruned) of the
            distributions over the next token, which costs one pass more for the intact model, once for the samples.
        batch_tokens: padded tokens a batch.
        ledger: folder in which measurements are kept (see `excise.measuring.ledger`): what is there is not measured
            again, and an interrupted pass goes on where it stopped.
        advance: called with tokens × candidates of each finished batch.

    Returns:
        Losses in the order of the distinct removals.

    Raises:
        InputError: a block or gate index does not fit the stack.
        ArchitectureError: a block that others depend on is to be removed.

    """
    batch_tokens = batch_tokens or default_batch_tokens(stack)
    indices = _gate_indices if sublayers else removable_indices
    distinct = tuple(dict.fromkeys(indices(stack, removed) for removed in removals))
    known = _open_ledger(stack, samples, sublayers, statistic, batch_tokens, ledger)
    new = tuple(removed for removed in distinct if removed not in known)
    if advance and len(new) < len(distinct):
        advance(samples.tokens * (len(distinct) - len(new)))
    if new:
        batches = _Batches(stack, samples, batch_tokens, statistic)
        known.add(new, *_measure_all(batches, new, _gates_off(stack, new, sublayers), known.journal(new), advance))
    entries = [known[removed] for removed in distinct]
    return Measurements(
        distinct,
        np.array([entry.sums for entry in entries]),
        np.array([sample.targets for sample in samples]),
        np.array([entry.tokens for entry in entries]),
    )


def known_removals(
    stack: Stack,
    samples: Samples,
    *,
    sublayers: bool = False,
    statistic: Statistic = "loss",
    batch_tokens: int | None = None,
    ledger: Path | None = None,
) -> tuple[Removal, ...]:
    """Removals that a ledger holds for these samples; arguments as for `measure`."""
    batch_tokens = batch_tokens or default_batch_tokens(stack)
    return tuple(_open_ledger(stack, samples, sublayers, statistic, batch_tokens, ledger))


def _open_ledger(
    stack: Stack, samples: Samples, sublayers: bool, statistic: Statistic, batch_tokens: int, folder: Path | None
) -> Ledger:
    if folder is None:
        return Ledger(None, {})
    facts = {"model_hash": model_identity(stack.model), "samples": samples.hash, "batch_tokens": batch_tokens}
    return Ledger(folder, {**facts, "sublayers": sublayers, "statistic": statistic})


class _Batches:
    """The samples in batches, each with what turns final hidden states into sums: losses, or divergences."""

    def __init__(self, stack: Stack, samples: Samples, batch_tokens: int, statistic: Statistic) -> None:
        self.stack, self._statistic = stack, statistic
        self.batches = make_batches(samples, batch_tokens)
        self._key = (model_identity(stack.model), samples.hash, batch_tokens) if statistic == "divergence" else ()

    def sums(self, number: int) -> Callable[[Tensor], Tensor]:
        """Function from final hidden states [batch, tokens, width] to sums [batch] of one batch."""
        batch = self.batches[number].to(self.stack.device)
        if self._statistic == "loss":
            return lambda hidden: sample_losses(self.stack, hidden, batch.labels).sums
        key = (*self._key, number)
        divergence = Divergence(self.stack, batch.input_ids, batch.labels, INTACT.get(key))
        INTACT.keep(key, divergence.intact)
        return divergence


@torch.no_grad()
def _measure_all(
    work: _Batches,
    removals: Sequence[Removal],
    off: np.ndarray,
    record: Journal,
    advance: Callable[[int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums [candidates, samples] and costs [candidates] of removals not yet known, a batch at a time."""
    for number, batch in enumerate(work.batches):
        if number not in record:
            sums = np.zeros((len(off), len(batch.indices)))
            computed = np.zeros(len(off), dtype=np.int64)
            evaluate = work.sums(number)
            for candidate, hidden, blocks in _trie(work.stack, batch.input_ids.to(work.stack.device), off):
                sums[candidate] = evaluate(hidden).double().cpu().numpy()
                computed[candidate] = blocks
            record.write(number, sums=sums, block_tokens=computed * batch.tokens)
        if advance:
            advance(batch.tokens * len(removals))
    pieces = [record.read(number) for number in range(len(work.batches))]
    order = np.argsort([i for batch in work.batches for i in batch.indices])
    sums = np.concatenate([piece["sums"] for piece in pieces], axis=1)[:, order]
    return sums, np.sum([piece["block_tokens"] for piece in pieces], axis=0) / len(work.stack.blocks)


def _gate_indices(stack: Stack, removed: Sequence[int]) -> Removal:
    gates = len(stack.sublayers)
    if len(set(removed)) != len(removed) or not set(removed) <= set(range(gates)):
        raise InputError(f"gate indices must be distinct and between 0 and {gates - 1}, got {list(removed)}")
    return tuple(sorted(removed))


def _gates_off(stack: Stack, removals: Sequence[Removal], sublayers: bool) -> np.ndarray:
    """Mask [candidates, gates] of the sublayers that are off."""
    owners = [sublayer.gate if sublayers else sublayer.block for sublayer in stack.sublayers]
    return np.array([np.isin(owners, removed) for removed in removals]).reshape(len(removals), len(owners))


def _trie(stack: Stack, input_ids: Tensor, off: np.ndarray) -> Iterator[tuple[int, Tensor, int]]:
    """Final hidden states of each candidate, depth first, with the number of blocks that had to be computed."""
    blocks = [sublayer.block for sublayer in stack.sublayers]
    states = [_block_states(stack, gates) for gates in off]
    # A block that others depend on runs even where all its sublayers are off.
    removed = [np.array([all(s) and i not in stack.fixed for i, s in enumerate(candidate)]) for candidate in states]
    order = sorted(range(len(states)), key=lambda i: states[i])
    starts = [0] + [_first_difference(states[a], states[b]) for a, b in itertools.pairwise(order)]
    if stack.architecture.kv_sharing:
        starts = [0] * len(order)  # blocks above a branching point may need keys and values from below it
    saved: dict[int, Tensor] = {}
    for place, candidate in enumerate(order):
        start = starts[place]
        saved = {depth: hidden for depth, hidden in saved.items() if depth <= start}
        wanted = _branch_points(starts, place)
        with (
            _path(stack, removed[candidate], start, saved, wanted),
            silent(stack, off[candidate] & ~removed[candidate][blocks]),
        ):
            hidden = stack.hidden(input_ids)
        yield candidate, hidden, int((~removed[candidate][start:]).sum())


def _block_states(stack: Stack, off: np.ndarray) -> list[tuple[bool, ...]]:
    """Which sublayers of each block are off."""
    return [tuple(bool(off[sublayer.gate]) for sublayer in block.sublayers) for block in stack.blocks]


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((depth for depth, (left, right) in enumerate(zip(a, b, strict=True)) if left != right), 0)


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
    through = pass_through(stack)
    replacements: dict[Any, Callable[..., Any]] = {b.module: through for b in stack.blocks if b.index < start}
    replacements |= {b.module: through for b in stack.blocks[start:] if removed[b.index]}
    if start > 0:
        replacements[stack.blocks[start - 1].module] = lambda *_, **__: block_output(stack, saved[start])

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            saved[depth] = block_input(args, kwargs)

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
