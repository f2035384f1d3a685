"""Sliding window merging (Ding et al., 2025, arXiv 2502.19159): merge neighbouring blocks while the output stays alike.

From the top (the last block never takes part), a window low … high grows downwards while
s = mean over samples of cos(vec R, vec trial) > T, where R is the final hidden state (after the final norm) of the
original model, tokens × width in one vector, and the trial is the model with the window merged into its lowest block.
When it stops growing, the window is merged and the next one begins below it; a window still open at the bottom is not
merged. `swm-figure` merges by the paper's formula, `swm-code` as its released code does (see `excise.surgery.merge`).

Beyond the original: its only knob is T and the number of removed blocks an outcome, so T is searched by bisection until
M blocks go. Where none does it, the sweep that removes most without exceeding M is completed: one block at a time is
merged into the kept block below it, the one that leaves s highest, and the note says so. A protected block is never
merged into another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from excise.choosing.criteria.selection import Selection, removable_blocks
from excise.data.batches import Batch, default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.measuring.measure import Removal
from excise.models.stack import Stack, bypass
from excise.surgery.merge import check_mergeable, merged, runs_of

BISECTIONS = 40


@dataclass(frozen=True)
class Sweep:
    """What one threshold leads to.

    Attributes:
        removed: blocks merged away, sorted; their runs are the windows.
        left_open: blocks that a window still open at the bottom would have merged away.

    """

    removed: Removal
    left_open: int


def figure(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Merge away `budget` blocks by the formula of the paper's figure.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to merge away.
        protected: blocks that are never merged into another.
        seed: not used; nothing here is random.
        work: not used; similarities are not kept.
        advance: called with tokens done, for each trial.

    Returns:
        A selection with `merge` set: its runs are to be merged, not dropped.

    Raises:
        ArchitectureError: merging is not defined for this model.

    """
    return _select("figure", stack, samples, budget, protected, advance)


def code(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Merge away `budget` blocks as the released code does; see `figure`."""
    return _select("code", stack, samples, budget, protected, advance)


def sweep(
    similarity: Callable[[Removal], float], blocks: int, threshold: float, protected: Iterable[int] = ()
) -> Sweep:
    """One run of the sliding window at a threshold.

    Args:
        similarity: s of the model in which a removal's runs are merged.
        blocks: N.
        threshold: T.
        protected: blocks that are never merged away.

    """
    stays = frozenset(protected)
    removed: Removal = ()
    high, low = blocks - 2, blocks - 3
    while low >= 0:
        if low + 1 not in stays and similarity((*range(low + 1, high + 1), *removed)) > threshold:
            low -= 1
        elif low + 1 != high:
            removed = (*range(low + 2, high + 1), *removed)
            high, low = low, low - 1
        else:
            high, low = high - 1, low - 1
    return Sweep(removed, max(0, high - low - 1))


def _select(
    rule: str,
    stack: Stack,
    samples: Samples,
    budget: int,
    protected: Sequence[int],
    advance: Callable[[int], None] | None,
) -> Selection:
    check_mergeable(stack)
    candidates = removable_blocks(stack, budget, protected)
    stays = [block.index for block in stack.blocks if block.index not in candidates]
    similarity = Similarity(stack, samples, rule, advance)
    found, threshold = _search(similarity, len(stack.blocks), budget, stays)
    removed, note = found.removed, f"threshold {threshold:.6g}"
    if len(removed) < budget:
        note += (
            f" removes {len(removed)} blocks and none tried removes {budget}; the other {budget - len(removed)} were "
            f"merged one at a time into the kept block below, each the one that leaves the output most alike"
        )
    while len(removed) < budget:
        removed = _one_more(similarity, removed, candidates, len(stack.blocks))
    return Selection(f"swm-{rule}", removed, forward_tokens=similarity.forward_tokens, merge=rule, note=note)


def _search(
    similarity: Callable[[Removal], float], blocks: int, budget: int, protected: Sequence[int]
) -> tuple[Sweep, float]:
    """Sweep that removes `budget` blocks and its threshold, or the one that removes most without exceeding it."""
    low, high = -1.0, 1.0  # a cosine
    best, best_threshold = Sweep((), 0), high
    for _ in range(BISECTIONS):
        threshold = (low + high) / 2
        found = sweep(similarity, blocks, threshold, protected)
        if len(best.removed) < len(found.removed) <= budget:
            best, best_threshold = found, threshold
        if len(best.removed) == budget:
            break
        if len(found.removed) + found.left_open > budget:  # a window open at the bottom had too low a threshold
            low = threshold
        else:
            high = threshold
    return best, best_threshold


def _one_more(
    similarity: Callable[[Removal], float], removed: Removal, candidates: Sequence[int], blocks: int
) -> Removal:
    """Add the one whose merging leaves the similarity highest; the first and the last only when none else is left."""
    rest = [i for i in candidates if i not in removed]
    inner = [i for i in rest if 0 < i < blocks - 1] or rest
    return max((tuple(sorted((*removed, i))) for i in inner), key=similarity)


class Similarity:
    """s of the model with a removal's runs merged, a function that remembers its values and counts its cost.

    Args:
        stack: the model.
        samples: calibration samples; the reference output of each is kept in memory, [tokens, width].
        rule: of merging.
        advance: called with tokens done.

    """

    def __init__(self, stack: Stack, samples: Samples, rule: str, advance: Callable[[int], None] | None = None) -> None:
        self._stack, self._rule, self._advance, self._samples = stack, rule, advance, len(samples)
        self._batches = make_batches(samples, default_batch_tokens(stack))
        self._known: dict[Removal, float] = {}
        self.forward_tokens = 0.0
        self._references = [self._hidden(batch, len(stack.blocks)).cpu() for batch in self._batches]

    def __call__(self, removed: Removal) -> float:
        """Mean over samples of cos(vec R, vec trial) with the runs of `removed` merged."""
        if removed not in self._known:
            self._known[removed] = self._measure(removed)
        return self._known[removed]

    def _measure(self, removed: Removal) -> float:
        total = 0.0
        with merged(self._stack, runs_of(removed), self._rule), bypass(self._stack, removed):
            for batch, reference in zip(self._batches, self._references, strict=True):
                trial = self._hidden(batch, len(self._stack.blocks) - len(removed))
                total += _flat_cosines(reference.to(trial.device), trial).sum().item()
        return total / self._samples

    @torch.no_grad()
    def _hidden(self, batch: Batch, blocks: int) -> Tensor:
        """Final hidden states [batch, tokens, width], zero on the padding."""
        batch = batch.to(self._stack.device)
        hidden = self._stack.hidden(batch.input_ids)
        self.forward_tokens += batch.tokens * blocks / len(self._stack.blocks)
        if self._advance:
            self._advance(batch.tokens)
        return hidden * batch.real.unsqueeze(-1).to(hidden.device)


def _flat_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [batch] between the samples of `a` and `b`, all dimensions but the first in one vector."""
    return torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=-1)
