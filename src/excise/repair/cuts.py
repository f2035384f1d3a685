"""Cuts: where a run of blocks was removed, and what of a block next to it a repair can be folded into."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

from excise.errors import ArchitectureError, InputError
from excise.measuring.sweep import alone, embedded
from excise.models.stack import SCALE, Stack, Sublayer, block_indices, first
from excise.repair.folds import Channels, Fold, Gain, Projection, probing_factors
from excise.repair.probe import Probe, matrices_of
from excise.repair.streams import swapped
from excise.surgery.merge import Run

PROBE_TOKENS = 4

LOWEST = (
    "the removed run at block 0 has no kept block below it into which a repair could be folded; "
    "keep block 0, or heal by training"
)

# What a map folds into does not depend on what the weights are, and every removal asks for its blocks. Reasons are
# kept as text: an error that was raised would hold the model by its traceback.
_Found = dict[tuple[int, tuple[str, ...] | None], tuple[Fold, ...] | str]
_FOUND: WeakKeyDictionary[Stack, _Found] = WeakKeyDictionary()


def cuts_of(stack: Stack, removed: Sequence[int]) -> tuple[Run, ...]:
    """The cuts of a removal, bottom to top: each maximal run of removed blocks with the kept block below it.

    The lowest has the block −1 below it where it begins at block 0.

    Raises:
        InputError: `removed` is empty or does not fit the stack.

    """
    removed = block_indices(stack, removed)
    if not 0 < len(removed) < len(stack.blocks):
        raise InputError(f"expected between 1 and {len(stack.blocks) - 1} removed blocks to repair, got {len(removed)}")
    cuts: list[Run] = []
    for index in removed:
        if cuts and cuts[-1].removed[-1] == index - 1:
            cuts[-1] = Run(cuts[-1].kept, (*cuts[-1].removed, index))
        else:
            cuts.append(Run(index - 1, (index,)))
    return tuple(cuts)


def folds_of(
    stack: Stack, blocks: Sequence[int], kinds: Sequence[str] | None
) -> dict[int, list[Fold] | ArchitectureError]:
    """Find what a map of a sublayer's output folds into exactly, block by block.

    A few tokens are sent through the intact model, once for each block and kinds: a matrix qualifies if another output
    of it moves the stream in proportion, where all other sublayers give what they gave, be the proportion a constant or
    one times a sigmoid gate of each token. So does a shared expert's matrix, to which the routed ones are added. Where
    no matrix does, the gains of the sublayer's output channels qualify if scaling the parameters that make them scales
    the output.

    Args:
        stack: the model.
        blocks: original indices; −1 stands for what is below the lowest.
        kinds: sublayers wanted in each, in order of computation ("attention", "feed-forward"); None takes the last.

    Returns:
        For each block a fold of each sublayer, or why folding into one of them would not be exact.

    Raises:
        InputError: `kinds` is empty.

    """
    if kinds is not None and not kinds:
        raise InputError("expected at least one kind of sublayer to fold into, such as 'feed-forward', got none")
    if stack.shares_kv:
        reason = (
            f"blocks of this {stack.architecture.model_type} use keys and values of blocks below them, so none can be "
            "run from a residual stream alone, as fitting a repair would; heal by training instead"
        )
        return {index: ArchitectureError(reason) for index in blocks}
    wanted = None if kinds is None else tuple(kinds)
    known = _FOUND.setdefault(stack, {})
    if new := [index for index in blocks if index >= 0 and (index, wanted) not in known]:
        known |= {(index, wanted): folds for index, folds in _found(stack, new, wanted).items()}
    found = {index: known[index, wanted] if index >= 0 else LOWEST for index in blocks}
    return {index: ArchitectureError(f) if isinstance(f, str) else list(f) for index, f in found.items()}


def _found(stack: Stack, blocks: Sequence[int], kinds: Sequence[str] | None) -> dict[int, tuple[Fold, ...] | str]:
    """The folds of each block, or why there are none."""
    names = {module: name for name, module in stack.model.named_modules()}
    found: dict[int, tuple[Fold, ...] | str] = {}
    tokens = torch.arange(PROBE_TOKENS, device=stack.device).unsqueeze(0) % stack.config.vocab_size
    with torch.no_grad():
        stream = embedded(stack, tokens)
    # Block by block, so that each is asked while its weights are there; none above the highest is of interest.
    for index in range(max(blocks) + 1):
        with alone(stack, index) as through:
            if index not in blocks:
                with torch.no_grad():
                    stream = through(tokens, stream)
                continue
            probe = Probe.of(stack.blocks[index], partial(through, tokens, stream))
            stream = probe.stream
            try:
                found[index] = tuple(_fold(stack, s, probe, names) for s in _sublayers(stack, index, kinds))
            except ArchitectureError as reason:
                found[index] = str(reason)
    return found


def _sublayers(stack: Stack, index: int, kinds: Sequence[str] | None) -> list[Sublayer]:
    """The sublayers of these kinds in a block, or the last."""
    there = {sublayer.kind: sublayer for sublayer in stack.blocks[index].sublayers if sublayer.kind != SCALE}
    if kinds is None:
        return list(there.values())[-1:]
    for kind in kinds:
        if kind not in there:
            raise ArchitectureError(_no_sublayer(index, kind, ", ".join(there)))
    return [there[kind] for kind in kinds]


def _fold(stack: Stack, sublayer: Sublayer, probe: Probe, names: Mapping[nn.Module, str]) -> Fold:
    """What a map of a sublayer's output folds into."""
    if not probe.stream.isfinite().all():
        raise ArchitectureError(f"the stream after block {sublayer.block} is not finite; try --dtype float32")
    # Output projections are registered last in most modules, so the search mostly ends at once.
    for module in reversed(matrices_of(sublayer)):
        if way := probe.way(sublayer, module):
            if module.weight.is_floating_point() and not module.weight.is_meta:
                return Projection(names[module], module, sublayer, way.scale, way.gate)
            raise ArchitectureError(
                f"the weights of {sublayer.name} are quantised or offloaded; load the model in plain floating "
                f"point, where it fits in memory, to repair it"
            )
    way = probe.way(sublayer, sublayer.module)
    if way is None:
        raise ArchitectureError(
            f"block {sublayer.block} of this {stack.architecture.model_type} is not the rest of it plus a multiple of "
            f"what {sublayer.name} ({type(sublayer.module).__name__}) gives, so a repair folded into that would not be "
            f"exact; heal by training instead"
        )
    gain = _gain_of(stack, sublayer, probe, names, way.scale)
    if gain is None:
        raise ArchitectureError(
            f"the output of {sublayer.name} ({type(sublayer.module).__name__}) is not that of one matrix, as with a "
            f"mixture of experts, so a linear map of it cannot be folded exactly; repair another kind of sublayer "
            f"(attention), or heal by training"
        )
    return gain


def _gain_of(
    stack: Stack, sublayer: Sublayer, probe: Probe, names: Mapping[nn.Module, str], scale: float
) -> Gain | None:
    """The gains of a sublayer's output channels; None where scaling what makes them does not scale the output."""
    module, block = sublayer.module, stack.blocks[sublayer.block]
    # Of a norm at the end the gain, else all that the output is linear in.
    own = f"{names[module]}."
    ending = [f"{own}weight"] if hasattr(module, "weight") else []
    inside = [f"{names[block.module]}.{name}" for name in sublayer.writes]
    parameters = [(name, stack.model.get_parameter(name)) for name in (ending if sublayer.inner else inside)]
    plain = all(p.is_floating_point() and not p.is_meta for _, p in parameters)
    if not parameters or not plain or module not in probe.calls:
        return None
    args, kwargs = probe.calls[module]
    with torch.no_grad():
        before = first(module(*args, **kwargs)).double()
    width = before.shape[-1]
    offsets = (0.0, 1.0) if sublayer.inner else (0.0,)
    guesses = [
        [Channels(axis, offset) for axis, size in enumerate(parameter.shape) if size == width for offset in offsets]
        for _, parameter in parameters
    ]
    factors = probing_factors(width, before.device)
    for guess in itertools.product(*guesses):
        named = {
            name: (stack.model.get_submodule(name.rpartition(".")[0]), channels)
            for (name, _), channels in zip(parameters, guess, strict=True)
        }
        gain = Gain(names[module], module, sublayer, scale, named)
        with torch.no_grad(), swapped(stack.model, gain.scaled(factors)):
            after = first(module(*args, **kwargs)).double()
        rounding = 16 * torch.finfo(parameters[0][1].dtype).eps
        if (after - before * factors).abs().max() <= rounding * max(1e-30, before.abs().max().item()):
            return gain
    return None


def _no_sublayer(index: int, kind: str, kinds: str) -> str:
    advice = (
        "its experts' outputs are mixed token by token, so that no one matrix makes them; repair 'attention' instead"
        if "moe" in kinds
        else "choose among those"
    )
    return f"block {index} has no sublayer '{kind}' to fold a repair into, only {kinds}: {advice}, or heal by training"
