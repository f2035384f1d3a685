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

import torch
from torch import Tensor

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.ising.problem import Removal
from excise.measuring.passes import over_batches
from excise.models.stack import bypass
from excise.surgery.merge import check_mergeable, merged, runs_of

# The last step is 2⁻³⁹, finer than the rounding of float32 streams.
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


@dataclass(frozen=True)
class SlidingWindow:
    """Criterion that merges blocks away while the final hidden state stays alike.

    Attributes:
        rule: of merging: "figure", the formula of the paper's figure, or "code", as the released code does.

    """

    rule: str

    def __call__(self, context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
        """Choose; the proposal's runs are to be merged (`merge` is set), not dropped.

        Raises:
            ArchitectureError: merging is not defined for this model.

        """
        stack, budget = context.stack, brief.budget
        check_mergeable(stack)
        candidates = brief.candidates(stack)
        stays = [block.index for block in stack.blocks if block.index not in candidates]
        similarity = Similarity(context, samples, self.rule)
        found, threshold = _search(similarity, len(stack.blocks), budget, stays)
        removed, note = found.removed, f"threshold {threshold:.6g}"
        if len(removed) < budget:
            note += (
                f" removes {len(removed)} blocks and none tried removes {budget}; the other {budget - len(removed)} "
                f"were merged one at a time into the kept block below, each the one that leaves the output most alike"
            )
        while len(removed) < budget:
            removed = _one_more(similarity, removed, candidates, len(stack.blocks))
        cost = Cost(similarity.forward_tokens)
        return [Proposal(f"swm-{self.rule}", removed, cost=cost, merge=self.rule, note=note)]


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
        # A window open at the bottom had too low a threshold.
        if len(found.removed) + found.left_open > budget:
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
        context: the model.
        samples: calibration samples; the reference output of each is kept in memory, [tokens, width].
        rule: of merging.

    """

    def __init__(self, context: Context, samples: Samples, rule: str) -> None:
        self._context, self._rule, self._samples = context, rule, samples
        self._known: dict[Removal, float] = {}
        self.forward_tokens = 0.0
        blocks = len(context.stack.blocks)
        self._references = [
            # Kept off a GPU: references of all samples together may be larger than its memory.
            self._hidden(batch, blocks).cpu()
            for _, batch in over_batches(context, samples, "reference output")
        ]

    def __call__(self, removed: Removal) -> float:
        """Mean over samples of cos(vec R, vec trial) with the runs of `removed` merged."""
        if removed not in self._known:
            self._known[removed] = self._measure(removed)
        return self._known[removed]

    def _measure(self, removed: Removal) -> float:
        total, stack = 0.0, self._context.stack
        with merged(stack, runs_of(removed), self._rule), bypass(stack, removed):
            for number, batch in over_batches(self._context, self._samples, "merged output"):
                trial = self._hidden(batch, len(stack.blocks) - len(removed))
                total += _flat_cosines(self._references[number].to(trial.device), trial).sum().item()
        return total / len(self._samples)

    @torch.no_grad()
    def _hidden(self, batch: Batch, blocks: int) -> Tensor:
        """Final hidden states [batch, tokens, width], zero on the padding."""
        stack = self._context.stack
        hidden = stack.hidden(batch.input_ids)
        self.forward_tokens += batch.tokens * blocks / len(stack.blocks)
        # Padding would count in a cosine over all tokens × width.
        return hidden * batch.real.unsqueeze(-1).to(hidden.device)


def _flat_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [batch] between the samples of `a` and `b`, all dimensions but the first in one vector."""
    return torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=-1)
