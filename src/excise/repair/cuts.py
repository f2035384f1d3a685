"""Cuts: where a run of blocks was removed, and what of a block next to it a repair can be folded into."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from excise.errors import ArchitectureError, InputError
from excise.measuring.sweep import alone, embedded
from excise.models.stack import Stack, Sublayer, block_indices, block_input, first
from excise.plain import Facts
from excise.repair.folds import Channels, Fold, Gain, Projection, probing_factors
from excise.repair.streams import swapped
from excise.surgery.merge import Run

PROBE_TOKENS = 4
MATRICES = (nn.Linear, Conv1D)

LOWEST = (
    "the removed run at block 0 has no kept block below it into which a repair could be folded; "
    "keep block 0, or heal by training"
)

Call = tuple[tuple[Any, ...], Facts]  # arguments of a module


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

    A few tokens are sent through the intact model: a matrix qualifies if its output is the sublayer's to the last bit,
    and if the block is its input plus what its sublayers give. Where no matrix does, the gains of the sublayer's output
    channels qualify if scaling the parameters that make them scales the output.

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
    if stack.architecture.kv_sharing:
        reason = (
            f"blocks of {stack.architecture.model_type} use keys and values of blocks below them, so none can be run "
            "from a residual stream alone, as fitting a repair would; heal by training instead"
        )
        return {index: ArchitectureError(reason) for index in blocks}
    names = {module: name for name, module in stack.model.named_modules()}
    scale = float(getattr(stack.model.config, "residual_multiplier", 1.0))
    found: dict[int, list[Fold] | ArchitectureError] = {}
    tokens = torch.arange(PROBE_TOKENS, device=stack.device).unsqueeze(0) % stack.config.vocab_size
    with torch.no_grad():
        stream = embedded(stack, tokens)
    # Block by block, so that each is asked while its weights are there; none above the highest is of interest.
    for index in range(min(blocks, default=0), max(blocks, default=-1) + 1):
        if index < 0:
            found[index] = ArchitectureError(LOWEST)
            continue
        with alone(stack, index) as through:
            with torch.no_grad(), _recorded(stack, index) as (outputs, inputs, calls):
                stream = through(tokens, stream)
            if index in blocks:
                found[index] = _asked(stack, index, kinds, names, outputs, inputs, calls, scale)
    return {index: found[index] for index in blocks}


def _asked(
    stack: Stack,
    index: int,
    kinds: Sequence[str] | None,
    names: Mapping[nn.Module, str],
    outputs: dict[Any, Tensor],
    inputs: dict[int, Tensor],
    calls: dict[Any, Call],
    scale: float,
) -> list[Fold] | ArchitectureError:
    """The folds of one block, or why there are none."""
    try:
        folds = _folds(stack, index, kinds, names, outputs, calls, scale)
        _check_sum(stack, index, outputs, inputs, scale)
    except ArchitectureError as reason:
        return reason
    return folds


def _folds(
    stack: Stack,
    index: int,
    kinds: Sequence[str] | None,
    names: Mapping[nn.Module, str],
    outputs: dict[Any, Tensor],
    calls: dict[Any, Call],
    scale: float,
) -> list[Fold]:
    block = stack.blocks[index]
    found: list[Fold] = []
    for kind in (block.sublayers[-1].kind,) if kinds is None else kinds:
        sublayer = next((s for s in block.sublayers if s.kind == kind), None)
        if sublayer is None:
            raise ArchitectureError(_no_sublayer(stack, index, kind))
        try:
            module = _matrix_of(sublayer, outputs)
            found.append(Projection(names[module], module, sublayer, scale))
        except ArchitectureError:
            gain = _gain_of(stack, sublayer, names, calls, scale)
            if gain is None:
                raise
            found.append(gain)
    return found


def _gain_of(
    stack: Stack, sublayer: Sublayer, names: Mapping[nn.Module, str], calls: dict[Any, Call], scale: float
) -> Gain | None:
    """The gains of a sublayer's output channels; None where scaling what makes them does not scale the output."""
    module, block = sublayer.module, stack.blocks[sublayer.block]
    # Of a norm at the end the gain, else all that the output is linear in.
    own = f"{names[module]}."
    ending = [f"{own}weight"] if hasattr(module, "weight") else []
    inside = [f"{names[block.module]}.{name}" for name in sublayer.writes]
    parameters = [(name, stack.model.get_parameter(name)) for name in (ending if sublayer.inner else inside)]
    plain = all(p.is_floating_point() and not p.is_meta for _, p in parameters)
    if not parameters or not plain or module not in calls:
        return None
    args, kwargs = calls[module]
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


@contextlib.contextmanager
def _recorded(stack: Stack, index: int) -> Iterator[tuple[dict[Any, Tensor], dict[int, Tensor], dict[Any, Call]]]:
    """Record the outputs of a block, its sublayers and their matrices, its input, and what its sublayers are given."""
    outputs: dict[Any, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    calls: dict[Any, Call] = {}

    def keep_output(module: nn.Module, args: object, output: Any) -> None:
        outputs[module] = first(output)

    def keep_input(module: nn.Module, args: tuple[Tensor, ...], kwargs: Facts) -> None:
        inputs[index] = block_input(args, kwargs)

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: Facts) -> None:
        calls[module] = args, kwargs

    block = stack.blocks[index]
    watched = {block.module, *(s.module for s in block.sublayers)}
    watched |= {m for s in block.sublayers for m in s.module.modules() if isinstance(m, MATRICES)}
    handles = [module.register_forward_hook(keep_output) for module in watched]
    handles.append(block.module.register_forward_pre_hook(keep_input, with_kwargs=True))
    handles += [s.module.register_forward_pre_hook(keep_call, with_kwargs=True) for s in block.sublayers]
    try:
        yield outputs, inputs, calls
    finally:
        for handle in handles:
            handle.remove()


def _matrix_of(sublayer: Sublayer, outputs: dict[Any, Tensor]) -> Any:
    """The matrix whose output is the sublayer's."""
    if sublayer.inner:
        raise ArchitectureError(
            f"{sublayer.name} ends in a norm ({type(sublayer.module).__name__}), so a linear map of its output "
            f"cannot be folded into a matrix exactly; heal by training instead"
        )
    result = outputs[sublayer.module]
    matrices = [m for m in sublayer.module.modules() if isinstance(m, MATRICES)]
    # Output projections are registered last in most modules, so the search mostly ends at once.
    for module in reversed(matrices):
        output = outputs.get(module)
        if output is None or output.shape != result.shape:
            continue
        # To the bit: a matrix followed by anything, such as a factor, is not the one to fold into.
        if torch.allclose(output, result, rtol=0, atol=0, equal_nan=True):
            if not module.weight.is_floating_point() or module.weight.is_meta:
                raise ArchitectureError(
                    f"the weights of {sublayer.name} are quantised or offloaded; load the model in plain floating "
                    f"point, where it fits in memory, to repair it"
                )
            return module
    raise ArchitectureError(
        f"the output of {sublayer.name} ({type(sublayer.module).__name__}) is not that of one matrix, as with a "
        f"mixture of experts, so a linear map of it cannot be folded exactly; repair another kind of sublayer "
        f"(attention), or heal by training"
    )


def _no_sublayer(stack: Stack, index: int, kind: str) -> str:
    kinds = ", ".join(s.kind for s in stack.blocks[index].sublayers)
    advice = (
        "its experts' outputs are mixed token by token, so that no one matrix makes them; repair 'attention' instead"
        if "moe" in kinds
        else "choose among those"
    )
    return f"block {index} has no sublayer '{kind}' to fold a repair into, only {kinds}: {advice}, or heal by training"


def _check_sum(stack: Stack, index: int, outputs: dict[Any, Tensor], inputs: dict[int, Tensor], scale: float) -> None:
    block = stack.blocks[index]
    added = sum(outputs[s.module].double() for s in block.sublayers)
    stream = outputs[block.module].double()
    difference = (stream - inputs[index].double() - scale * added).abs().max().item()
    # A few roundings of the stream's dtype are no reason to refuse; a factor left out is far above them.
    rounding = 8 * torch.finfo(outputs[block.module].dtype).eps
    if difference > rounding * max(1.0, stream.abs().max().item()):
        raise ArchitectureError(
            f"block {index} of this {stack.model.config.model_type} is not its input plus {scale:g} times its "
            f"sublayers (off by {difference:.3g}), so a repair folded into them would not be exact; heal by "
            f"training instead"
        )
