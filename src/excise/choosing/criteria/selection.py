"""What a criterion answers, and the one pass over block inputs and outputs that several of them share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from excise.data.batches import default_batch_tokens, make_batches
from excise.data.samples import Samples
from excise.errors import InputError
from excise.models.identity import model_identity
from excise.models.stack import Block, Stack, block_indices, block_input, bypass, first


class Spent(NamedTuple):
    """Cost up to a point: tokens through the whole intact stack, and seconds."""

    forward_tokens: float
    seconds: float


@dataclass(frozen=True)
class Selection:
    """Blocks to remove, as a criterion chose them.

    Attributes:
        method: name of the criterion.
        removed: sorted original indices of blocks; for a sublayer criterion, the blocks of which nothing is left.
        scores: the criterion's score of each block [blocks] (of each sublayer [gates], for a sublayer criterion) in the
            intact model, None for those without one; None where the criterion scores no single blocks.
        order: original indices (gates, for a sublayer criterion) in the order of removal, where a smaller budget would
            have removed the first of them; empty where every budget is another search.
        forward_tokens: cost, in tokens through the whole intact stack.
        backward_tokens: cost, in tokens back through the whole intact stack.
        sublayers: sorted gate indices of everything a sublayer criterion removes, those of `removed` included.
        merge: rule of `excise.surgery.merge` by which the runs of `removed` are merged into the block kept; None where
            they are dropped.
        note: what a reader must know: where the criterion had to depart from its original.
        trail: what had been spent when each of `order` was removed; empty where the last costs what the first does.
        reused_seconds: what passes had taken that were made for another criterion and used again here.
        seconds: what choosing took, those included; whoever calls a criterion takes the time.

    """

    method: str
    removed: tuple[int, ...]
    scores: tuple[float | None, ...] | None = None
    order: tuple[int, ...] = ()
    forward_tokens: float = 0.0
    backward_tokens: float = 0.0
    sublayers: tuple[int, ...] = ()
    merge: str | None = None
    note: str = ""
    trail: tuple[Spent, ...] = ()
    reused_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Means over tokens of what blocks do to the residual stream; NaN for bypassed blocks.

    Attributes:
        cosine: [blocks], cos(x_in, x_out).
        norm_ratio: [blocks], ‖x_out‖ / ‖x_in‖.
        forward_tokens: cost.
        reused_seconds: what the pass had taken, where it was made earlier.

    """

    cosine: np.ndarray
    norm_ratio: np.ndarray
    forward_tokens: float
    reused_seconds: float = 0.0


# Several criteria look at the intact model's blocks on the same samples: one pass serves them all.
_LAST: dict[tuple[str, str, tuple[int, ...]], BlockStatistics] = {}


@torch.no_grad()
def block_statistics(
    stack: Stack,
    samples: Samples,
    *,
    removed: Sequence[int] = (),
    batch_tokens: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> BlockStatistics:
    """Measure every block's input and output in one pass, on hooks.

    Hooks rather than `output_hidden_states`: its last entry stands after the final norm, which distorts the last block.

    Args:
        stack: the model.
        samples: calibration samples; every real token counts once.
        removed: blocks bypassed meanwhile.
        batch_tokens: padded tokens a batch.
        advance: called with the tokens of each finished batch.

    """
    removed = block_indices(stack, removed)
    key = (model_identity(stack.model), samples.hash, removed)
    if key in _LAST:
        if advance:
            advance(samples.tokens)
        return _LAST[key]
    alive = [block for block in stack.blocks if block.index not in removed]
    sums = np.zeros((2, len(stack.blocks)))
    started, tokens = time.perf_counter(), 0
    for batch in make_batches(samples, batch_tokens or default_batch_tokens(stack)):
        batch = batch.to(stack.device)
        with bypass(stack, removed), block_hooks(alive, partial(_accumulate, sums, batch.real)):
            stack.model.base_model(input_ids=batch.input_ids, use_cache=False)
        tokens += batch.tokens
        if advance:
            advance(batch.tokens)
    sums[:, list(removed)] = np.nan
    statistics = BlockStatistics(sums[0] / tokens, sums[1] / tokens, tokens * len(alive) / len(stack.blocks))
    if not removed:
        _LAST.clear()
        _LAST[key] = replace(statistics, reused_seconds=time.perf_counter() - started)
    return statistics


def _accumulate(sums: np.ndarray, real: Tensor, block: int, x_in: Tensor, x_out: Tensor) -> None:
    before, after = x_in[real.to(x_in.device)].double(), x_out[real.to(x_out.device)].double()
    norm_in, norm_out = before.norm(dim=-1), after.norm(dim=-1)
    sums[0, block] += ((before * after).sum(dim=-1) / (norm_in * norm_out)).sum().item()
    sums[1, block] += (norm_out / norm_in).sum().item()


@contextlib.contextmanager
def block_hooks(blocks: Sequence[Block], record: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which `record(index, x_in, x_out)` sees the residual stream before and after each of `blocks`."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, block: int) -> None:
        record(block, block_input(args, kwargs), first(output))

    handles = [
        block.module.register_forward_hook(partial(hook, block=block.index), with_kwargs=True) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def removable_blocks(stack: Stack, budget: int, protected: Sequence[int] = ()) -> list[int]:
    """Blocks a criterion may choose from.

    Raises:
        InputError: the budget does not fit them.

    """
    kept = set(block_indices(stack, protected))
    removable = [b.index for b in stack.blocks if b.index not in kept and b.index not in stack.fixed]
    if not 1 <= budget <= len(removable):
        raise InputError(f"budget must be between 1 and {len(removable)} (removable blocks), got {budget}")
    return removable


def lowest(scores: np.ndarray, budget: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """The `budget` candidates with the smallest scores, sorted; see `ranking`."""
    return tuple(sorted(ranking(scores, budget, candidates)))


def ranking(scores: np.ndarray, budget: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """The `budget` candidates with the smallest scores, smallest first; the lower index where they tie, NaN last."""
    return tuple(sorted(candidates, key=lambda i: (bool(np.isnan(scores[i])), scores[i], i))[:budget])


def sublayer_selection(method: str, stack: Stack, gates: Sequence[int], **fields: Any) -> Selection:
    """Selection of sublayers: `removed` are the blocks that lose all of theirs."""
    gone = set(gates)
    removed = tuple(b.index for b in stack.blocks if all(s.gate in gone for s in b.sublayers))
    return Selection(method, removed, sublayers=tuple(sorted(gone)), **fields)


def sublayer_budget(stack: Stack, budget: int) -> int:
    """Sublayers that weigh as much as `budget` blocks, counted: 2M where a block has attention and feed-forward."""
    return round(budget * len(stack.sublayers) / len(stack.blocks))


def at_smaller_budget(whole: Selection, stack: Stack, budget: int) -> Selection | None:
    """What a criterion would have chosen, and spent, with a smaller budget; None where that is another search.

    Args:
        whole: its choice at a larger (or the same) budget.
        stack: the model.
        budget: number of blocks to remove.

    """
    units = sublayer_budget(stack, budget) if whole.sublayers else budget
    if not units <= len(whole.order):
        return None
    if units == len(whole.order):
        return whole
    order = whole.order[:units]
    spent = whole.trail[units - 1] if whole.trail else Spent(whole.forward_tokens, whole.seconds)
    smaller = replace(whole, **spent._asdict(), order=order, trail=whole.trail[:units], note="")
    if whole.sublayers:
        gone = sublayer_selection(whole.method, stack, order)
        return replace(smaller, removed=gone.removed, sublayers=gone.sublayers)
    return replace(smaller, removed=tuple(sorted(order)))
