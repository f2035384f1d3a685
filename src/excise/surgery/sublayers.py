"""Removing sublayers by themselves: the weights that write what they add to the residual stream become 0.

That is exact and loads anywhere, and it makes nothing smaller or faster; the recipe and the model card say so. A block
that loses all its sublayers is removed for good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from excise.errors import ArchitectureError, CheckpointError, InputError
from excise.models.stack import Stack, Sublayer, block_indices, first


@dataclass(frozen=True)
class Removal:
    """What goes for good, and what is set to 0.

    Attributes:
        blocks: removed blocks, sorted original indices.
        zeroed: gates of the sublayers that are set to 0 in blocks that stay, sorted.

    """

    blocks: tuple[int, ...]
    zeroed: tuple[int, ...]


def named_sublayers(stack: Stack, names: Sequence[str]) -> tuple[int, ...]:
    """Gates [sorted] of sublayers by name.

    Args:
        stack: the model.
        names: such as "3.attention", or "3.moe+feed-forward" for two of one block; negative blocks count from the top.

    Raises:
        InputError: no such sublayer, or one is named twice.

    """
    gates: list[int] = []
    for name in names:
        text, _, kinds = name.strip().partition(".")
        try:
            (index,) = block_indices(stack, [int(text)])
        except ValueError:
            raise InputError(f"expected a sublayer such as 3.attention, got '{name}'") from None
        known = {sublayer.kind: sublayer.gate for sublayer in stack.blocks[index].sublayers}
        unknown = [kind for kind in kinds.split("+") if kind not in known]
        if unknown:
            raise InputError(f"block {index} has no sublayer '{unknown[0]}', only {', '.join(known)}; got '{name}'")
        gates += [known[kind] for kind in kinds.split("+")]
    if len(set(gates)) != len(gates):
        raise InputError(f"a sublayer is named twice in {', '.join(names)}")
    return tuple(sorted(gates))


def as_removal(stack: Stack, removed: Sequence[int] = (), gates: Sequence[int] = ()) -> Removal:
    """Divide a removal of blocks and of sublayers into blocks that go and sublayers that are set to 0.

    Args:
        stack: the model.
        removed: blocks; negative ones count from the top.
        gates: gates of further sublayers; those in removed blocks add nothing to the removal.

    Raises:
        InputError: an index does not fit the stack.
        ArchitectureError: a sublayer cannot go without its block.

    """
    whole = set(block_indices(stack, removed))
    off = set(gates)
    outside = sorted(off - set(range(len(stack.sublayers))))
    if outside:
        raise InputError(f"gate indices must be between 0 and {len(stack.sublayers) - 1}, got {outside}")
    for block in stack.blocks:
        if block.index not in stack.fixed and all(sublayer.gate in off for sublayer in block.sublayers):
            whole.add(block.index)
    zeroed = [s for s in stack.sublayers if s.gate in off and s.block not in whole]
    for sublayer in zeroed:
        if not sublayer.writes:
            raise ArchitectureError(
                f"{sublayer.name} of this {stack.architecture.model_type} can only go with its whole block: its record "
                f"names no weights that could be set to 0"
            )
    return Removal(tuple(sorted(whole)), tuple(sublayer.gate for sublayer in zeroed))


@contextlib.contextmanager
def zeroed(stack: Stack, gates: Sequence[int]) -> Iterator[None]:
    """Context in which the weights that write what these sublayers add are 0; their own come back at the end.

    Args:
        stack: the model.
        gates: gates of the sublayers, `Removal.zeroed`.

    Raises:
        ArchitectureError: a sublayer still adds something, so its record names too few weights.
        CheckpointError: the weights are quantised or offloaded.

    """
    off = set(gates)
    sublayers = [sublayer for sublayer in stack.sublayers if sublayer.gate in off]
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for sublayer in sublayers:
            for name in sublayer.writes:
                weight = stack.blocks[sublayer.block].module.get_parameter(name)
                if weight.is_meta or not weight.is_floating_point():
                    raise CheckpointError(
                        f"{name} of block {sublayer.block} is quantised or offloaded, so it cannot be set to 0; load "
                        f"the model in a floating dtype where it fits in memory"
                    )
                originals.append((weight, weight.data))
                weight.data = torch.zeros_like(weight.data)
        if sublayers:
            _check_silent(stack, sublayers)
        yield
    finally:
        for weight, data in originals:
            weight.data = data


@torch.no_grad()
def _check_silent(stack: Stack, sublayers: Sequence[Sublayer]) -> None:
    heard: list[str] = []

    def hook(module: nn.Module, args: Any, output: Any, name: str) -> None:
        # Zero times a NaN that comes from below is NaN: not this sublayer's doing, and the self-test's to find.
        if first(output).nan_to_num(0.0, 0.0, 0.0).count_nonzero() > 0:
            heard.append(name)

    handles = [s.module.register_forward_hook(partial(hook, name=s.name)) for s in sublayers]
    try:
        tokens = torch.arange(4, device=stack.device).unsqueeze(0) % stack.config.vocab_size
        stack.hidden(tokens)
    finally:
        for handle in handles:
            handle.remove()
    if heard:
        raise ArchitectureError(
            f"{heard[0]} still adds to the residual stream with the weights at 0 that the record of "
            f"{stack.architecture.model_type} names as `writes`; it lacks some"
        )
