"""LLM-Drop (He et al., What Matters in Transformers?, 2024, arXiv 2406.15786): drop sublayers that turn x least.

Score of a sublayer: mean over tokens of cos(x, x + f(norm x)), where f is the attention or the feed-forward and x the
residual stream it is added to. The highest are dropped in one shot: attention only, feed-forward only, or both ranked
together.

A sublayer method, see `block_pruner`: at a budget of M blocks it removes as many sublayers as M blocks have, whatever
their kind, and is measured with those gates off. Where attention and feed-forward are added side by side (parallel
architectures), x of the feed-forward is taken after the attention, in the order of addition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise.choosing.criteria.selection import (
    Selection,
    block_hooks,
    lowest,
    ranking,
    removable_blocks,
    sublayer_budget,
    sublayer_selection,
)
from excise.data.batches import default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.models.stack import SCALE, Stack, first

SUM_TOLERANCE = 0.05  # bfloat16 streams add up to about 1 %; a missing factor shows as tens of per cent


def attention(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove attention sublayers only.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks whose worth of sublayers is removed.
        protected: blocks whose sublayers stay.
        seed: not used; nothing here is random.
        work: not used; one pass is not resumed.
        advance: called with tokens done.

    Raises:
        InputError: there are fewer attention sublayers than that.

    """
    return _drop("llm-drop-attention", {"attention"}, stack, samples, budget, protected, advance)


def feed_forward(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove feed-forward sublayers (mixtures of experts included) only; see `attention`."""
    return _drop("llm-drop-feed-forward", {"feed-forward", "moe"}, stack, samples, budget, protected, advance)


def joint(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove sublayers of every kind, ranked together; see `attention`."""
    kinds = {sublayer.kind for sublayer in stack.sublayers}
    return _drop("llm-drop-joint", kinds, stack, samples, budget, protected, advance)


def _drop(
    method: str,
    kinds: set[str],
    stack: Stack,
    samples: Samples,
    budget: int,
    protected: Sequence[int],
    advance: Callable[[int], None] | None,
) -> Selection:
    blocks = removable_blocks(stack, budget, protected)
    gates = [s.gate for s in stack.sublayers if s.block in blocks and s.kind in kinds]
    count = sublayer_budget(stack, budget)
    if count > len(gates):
        raise InputError(
            f"{method} would have to remove {count} sublayers for a budget of {budget} blocks, and only {len(gates)} "
            f"of its kind may go; lower the budget, or use llm-drop-joint"
        )
    cosines = sublayer_cosines(stack, samples, advance=advance)
    return sublayer_selection(
        method,
        stack,
        lowest(-cosines, count, gates),
        scores=tuple(map(float, cosines)),
        order=ranking(-cosines, count, gates),
        forward_tokens=samples.tokens,
    )


@torch.no_grad()
def sublayer_cosines(stack: Stack, samples: Samples, *, advance: Callable[[int], None] | None = None) -> np.ndarray:
    """Mean over tokens of cos(x, x + f(norm x)) of every sublayer [gates], in one pass.

    Raises:
        ArchitectureError: a block's output is not its input plus what its sublayers give.

    """
    sums = np.zeros(len(stack.sublayers))
    for batch in make_batches(samples, default_batch_tokens(stack)):
        batch = batch.to(stack.device)
        outputs: dict[int, Tensor] = {}
        record = partial(_add_cosines, sums, stack, outputs, batch.real)
        with _kept_outputs(stack, outputs), block_hooks(stack.blocks, record):
            stack.hidden(batch.input_ids)
        if advance:
            advance(batch.tokens)
    return sums / samples.tokens


def _add_cosines(
    sums: np.ndarray, stack: Stack, outputs: dict[int, Tensor], real: Tensor, block: int, x_in: Tensor, x_out: Tensor
) -> None:
    real = real.to(x_in.device)
    factor = getattr(stack.config, "residual_multiplier", 1.0)  # Granite scales what it adds
    x = x_in[real].double()
    for sublayer in stack.blocks[block].sublayers:
        added = sublayer.share * outputs.pop(sublayer.gate).reshape(x_in.shape)[real].double()
        after = x + (added if sublayer.kind == SCALE else factor * added)
        sums[sublayer.gate] += torch.nn.functional.cosine_similarity(x, after, dim=-1).sum().item()
        x = after
    end = x_out[real].double()
    if (x - end).norm() > SUM_TOLERANCE * end.norm():
        raise ArchitectureError(
            f"block {block} of this {stack.model.config.model_type} is not its input plus the outputs of its "
            f"sublayers, so LLM-Drop's cosines cannot be taken; choose a criterion over whole blocks"
        )


@contextlib.contextmanager
def _kept_outputs(stack: Stack, outputs: dict[int, Tensor]) -> Iterator[None]:
    def hook(module: Any, args: Any, output: Any, gate: int) -> None:
        tensor = first(output)
        outputs[gate] = tensor

    handles = [s.module.register_forward_hook(partial(hook, gate=s.gate)) for s in stack.sublayers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
