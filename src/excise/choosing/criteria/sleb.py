"""SLEB (Song et al., 2024, arXiv 2402.09025): greedy removal of the block without which the model predicts best.

Score of a block: Σ over samples of the mean token negative log-likelihood × the sample's length, with the block off and
those already removed off too. Each round removes the block of least score and measures all others again. The first and
the last block still there are never candidates.

Beyond the original: candidates that share their lowest blocks share the computation of those
(`excise.measuring.measure`), which changes cost, not choice; and where only the first and last block are left to
choose from, they may go, with a note.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from excise.choosing.brief import Brief
from excise.choosing.criteria.greedy import greedy
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.measuring.measure import Measurements


def sleb(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove blocks one at a time, each the one whose absence costs least likelihood."""
    stack, candidates = context.stack, brief.candidates(context.stack)
    lengths = np.array([len(sample.input_ids) for sample in samples])

    def total(measured: Measurements) -> np.ndarray:
        # As in the original, a mean per sample times its length, which is not the mean per token where some do not
        # count.
        return (measured.sums / measured.counts * lengths).sum(axis=1)

    def pool(gone: Sequence[int]) -> list[int]:
        alive = [block.index for block in stack.blocks if block.index not in gone]
        eligible = [i for i in candidates if i in alive[1:-1]]
        return eligible or [i for i in candidates if i in alive]

    result = greedy(context, samples, brief.budget, pool, total)
    ends = [i for i in result.order if i in (0, len(stack.blocks) - 1)]
    return [
        Proposal(
            "sleb",
            tuple(sorted(result.order)),
            tuple(result.scores.get(block.index) for block in stack.blocks),
            result.order,
            result.trail[-1],
            trail=result.trail,
            note=f"nothing else was left, so blocks {ends} go, which the original keeps" if ends else "",
        )
    ]
