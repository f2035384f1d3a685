"""Merging removed blocks into one that stays, instead of dropping them (sliding window merging's two rules).

Ding et al., 2025, arXiv 2502.19159. Merged are the matrices q, k, v, o, gate, up and down; everything else of the block
that stays (norms, biases, its place in the KV cache, its window) remains its own. Dense pre-norm blocks only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.errors import ArchitectureError, InputError
from excise.models.architectures.record import ATTENTION, FEED_FORWARD
from excise.models.stack import Stack, block_indices

MATRICES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


@dataclass(frozen=True)
class Run:
    """Blocks that become one: `removed` (sorted original indices) are merged into `kept`."""

    kept: int
    removed: tuple[int, ...]


def runs_of(removed: Sequence[int]) -> tuple[Run, ...]:
    """Runs by which any removal can be merged.

    Each maximal run of removed blocks is merged into the kept block just below it. A run that starts at block 0 has
    none below, so it is merged into the kept block just above it, together with the run above that block, if any.

    Args:
        removed: original indices, from 0.

    Examples:
        >>> runs_of([2, 3, 6])
        (Run(kept=1, removed=(2, 3)), Run(kept=5, removed=(6,)))
        >>> runs_of([0, 1, 3])
        (Run(kept=2, removed=(0, 1, 3)),)

    """
    gone = set(removed)
    absorbed: dict[int, list[int]] = {}
    for block in sorted(gone):
        kept = block
        while kept in gone and kept >= 0:
            kept -= 1
        if kept < 0:
            kept = block
            while kept in gone:
                kept += 1
        absorbed.setdefault(kept, []).append(block)
    return tuple(Run(kept, tuple(blocks)) for kept, blocks in sorted(absorbed.items()))


def figure_rule(blocks: Mapping[int, Float[Tensor, "*shape"]], kept: int) -> Float[Tensor, "*shape"]:
    """θ_l + Σ_k (θ_k − θ_l): the kept block's matrix and how every other differs from it, as the paper's figure says.

    Args:
        blocks: original index → matrix, of the kept block and of those merged into it.
        kept: index l of the kept block.

    """
    base = blocks[kept]
    wide = base.double() if base.dtype == torch.float64 else base.float()
    merged = wide.clone()
    for block, matrix in blocks.items():
        if block != kept:
            merged += matrix.to(wide) - wide
    return merged.to(base.dtype)


def code_rule(blocks: Mapping[int, Float[Tensor, "*shape"]], kept: int) -> Float[Tensor, "*shape"]:
    """The topmost block's matrix, which is what the released code comes to.

    That code adds θ_k − θ_l for k upwards and updates θ_l as it goes: every step replaces θ_l by θ_k, but for rounding,
    which is left out here. Where the kept block is the topmost, as it may be above a run that starts at block 0,
    nothing changes.
    """
    return blocks[max(blocks)].clone()


RULES: dict[str, Callable[[Mapping[int, Tensor], int], Tensor]] = {"figure": figure_rule, "code": code_rule}


@contextlib.contextmanager
def merged(stack: Stack, runs: Sequence[Run], rule: str) -> Iterator[tuple[int, ...]]:
    """Context in which the kept block of each run has the merged matrices; its own come back at the end.

    The blocks merged away are still there: remove them, for a while with `bypass` or `measure`, for good with
    `write_pruned`, inside this context.

    Args:
        stack: the model.
        runs: what becomes one; see `runs_of` for the runs of a removal.
        rule: "figure" or "code", see `figure_rule` and `code_rule`.

    Yields:
        The blocks to remove, sorted original indices.

    Raises:
        ArchitectureError: the blocks are not dense pre-norm blocks with plain matrices of one shape.
        InputError: the rule is not known, or the runs overlap or do not fit the stack.

    """
    if rule not in RULES:
        raise InputError(f"merging rule must be one of {', '.join(RULES)}, got {rule!r}")
    removed = block_indices(stack, [block for run in runs for block in run.removed])
    kept = block_indices(stack, [run.kept for run in runs])
    if set(kept) & set(removed):
        raise InputError(f"blocks {sorted(set(kept) & set(removed))} are merged away and merged into at once")
    check_mergeable(stack)
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for run in runs:
                for name in MATRICES:
                    weights = {block: _weight(stack, block, name) for block in (run.kept, *run.removed)}
                    target = weights[run.kept]
                    device = target.device
                    change = RULES[rule]({k: w.data.to(device) for k, w in weights.items()}, run.kept)
                    originals.append((target, target.data))
                    target.data = change
        yield removed
    finally:
        for weight, data in originals:
            weight.data = data


def merging(stack: Stack, removed: Sequence[int], rule: str | None) -> contextlib.AbstractContextManager[Any]:
    """Context in which the runs of `removed` are merged by `rule` (see `merged`); without a rule nothing happens.

    For callers that drop or merge, as the user wishes: measure, write or test inside it.
    """
    if rule is None:
        return contextlib.nullcontext()
    return merged(stack, runs_of(block_indices(stack, removed)), rule)


def check_mergeable(stack: Stack) -> None:
    """Refuse a model that merging is not defined for.

    Raises:
        ArchitectureError: its blocks are not pre-norm attention and dense feed-forward with the seven matrices, of one
            shape in all blocks, in plain floating point and in memory.

    """
    model_type = stack.model.config.model_type
    if stack.architecture.sublayers != (ATTENTION, FEED_FORWARD):
        kinds = " and ".join(f"{record.kind} ({record.module})" for record in stack.architecture.sublayers)
        raise ArchitectureError(
            f"merging is defined for dense pre-norm blocks, attention (self_attn) and feed-forward (mlp); those of "
            f"this {model_type} are {kinds}. Drop the blocks instead"
        )
    for name in MATRICES:
        shapes = set()
        for block in stack.blocks:
            try:
                weight = _weight(stack, block.index, name)
            except AttributeError:
                raise ArchitectureError(
                    f"merging needs the matrices {', '.join(MATRICES)}; block {block.index} of this {model_type} has "
                    f"no {name}. Drop the blocks instead"
                ) from None
            if not weight.is_floating_point() or weight.is_meta:
                raise ArchitectureError(
                    f"merging needs plain floating-point weights in memory; {name} of block {block.index} is quantised "
                    f"or offloaded. Load the model dequantised where it fits"
                )
            shapes.add(tuple(weight.shape))
        if len(shapes) > 1:
            raise ArchitectureError(
                f"merging needs blocks of one shape; {name} of this {model_type} comes as {sorted(shapes)}. "
                f"Drop the blocks instead"
            )


def _weight(stack: Stack, block: int, name: str) -> nn.Parameter:
    return stack.blocks[block].module.get_parameter(f"{name}.weight")
