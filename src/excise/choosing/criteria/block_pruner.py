"""BlockPruner (Zhong et al., 2024, arXiv 2406.10594): greedy over sublayers, by perplexity with one sublayer off.

A sublayer method: attention and feed-forward go separately, so its results carry gate indices (`Selection.sublayers`).
For comparison at a budget of M blocks it removes as many sublayers as M blocks have, 2M in a usual stack; what it
removes is measured with those gates off. Fewer parameters may go than with M whole blocks, if it prefers attention.

Beyond the original: candidates that share their lowest blocks share the computation of those, which changes cost only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from excise.choosing.criteria.greedy import greedy
from excise.choosing.criteria.selection import Selection, removable_blocks, sublayer_budget, sublayer_selection
from excise.data.samples import Samples
from excise.measuring.measure import Measurements
from excise.models.stack import Stack


def block_pruner(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the sublayers of `budget` blocks' worth, one at a time, each the one whose absence costs least perplexity.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks whose worth of sublayers is removed.
        protected: blocks whose sublayers stay.
        seed: not used; nothing here is random.
        work: folder in which measurements are kept, so that an interrupted search goes on.
        advance: called with tokens × candidates done.

    """
    candidates = removable_blocks(stack, budget, protected)
    gates = [sublayer.gate for sublayer in stack.sublayers if sublayer.block in candidates]
    result = greedy(
        stack,
        samples,
        min(sublayer_budget(stack, budget), len(gates)),
        lambda gone: [gate for gate in gates if gate not in gone],
        _perplexity,
        sublayers=True,
        work=work,
        advance=advance,
    )
    return sublayer_selection(
        "block-pruner",
        stack,
        result.order,
        scores=tuple(result.scores.get(sublayer.gate) for sublayer in stack.sublayers),
        order=result.order,
        forward_tokens=result.trail[-1].forward_tokens,
        trail=result.trail,
    )


def _perplexity(measured: Measurements) -> np.ndarray:
    return np.exp(measured.losses)
