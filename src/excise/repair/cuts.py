"""Cuts: where a run of blocks was removed, and the matrix of the block below into which a repair can be folded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from excise.errors import ArchitectureError, InputError
from excise.models.stack import Stack, Sublayer, block_indices, first
from excise.plain import Facts
from excise.surgery.merge import Run

PROBE_TOKENS = 4
MATRICES = (nn.Linear, Conv1D)


@dataclass(frozen=True, eq=False)
class Projection:
    """The last matrix of a sublayer: its output is the sublayer's.

    Attributes:
        name: of the module, from the model's root.
        module: a linear module with plain floating-point weights.
        sublayer: whose output it makes.
        scale: what that output is multiplied by before it is added to the residual stream.

    """

    name: str
    module: Any
    sublayer: Sublayer
    scale: float

    @property
    def matrix(self) -> Tensor:
        """The weight as [in, out]: output = input @ matrix + bias."""
        weight = self.module.weight.data
        return weight if isinstance(self.module, Conv1D) else weight.T

    def stored(self, matrix: Tensor) -> Tensor:
        """Bring a matrix [in, out] into the weight's own layout and dtype."""
        weight = self.module.weight
        layout = matrix if isinstance(self.module, Conv1D) else matrix.T
        return layout.to(weight.dtype).contiguous()


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


def output_projections(
    stack: Stack, blocks: Sequence[int], kinds: Sequence[str] | None
) -> dict[int, list[Projection] | ArchitectureError]:
    """Find the matrices into which a map of their sublayer's output folds exactly, block by block.

    A few tokens are sent through the intact model: a matrix qualifies if its output is the sublayer's to the last bit,
    and if the block is its input plus what its sublayers give.

    Args:
        stack: the model.
        blocks: original indices; −1 stands for what is below the lowest.
        kinds: sublayers wanted in each, in order of computation ("attention", "feed-forward"); None takes the last.

    Returns:
        For each block its matrices, or why folding into one of them would not be exact.

    Raises:
        InputError: `kinds` is empty.

    """
    if kinds is not None and not kinds:
        raise InputError("expected at least one kind of sublayer to fold into, such as 'feed-forward', got none")
    names = {module: name for name, module in stack.model.named_modules()}
    scale = float(getattr(stack.model.config, "residual_multiplier", 1.0))
    found: dict[int, list[Projection] | ArchitectureError] = {}
    inside = [index for index in blocks if index >= 0]
    with _recorded(stack, inside) as (outputs, inputs):
        tokens = torch.arange(PROBE_TOKENS, device=stack.device).unsqueeze(0) % stack.model.config.vocab_size
        with torch.no_grad():
            stack.hidden(tokens)
        for index in blocks:
            try:
                found[index] = _projections(stack, index, kinds, names, outputs, scale)
                _check_sum(stack, index, outputs, inputs, scale)
            except ArchitectureError as reason:
                found[index] = reason
    return found


def _projections(
    stack: Stack,
    index: int,
    kinds: Sequence[str] | None,
    names: Mapping[nn.Module, str],
    outputs: dict[Any, Tensor],
    scale: float,
) -> list[Projection]:
    if index < 0:
        raise ArchitectureError(
            "the removed run at block 0 has no kept block below it into which a repair could be folded; "
            "keep block 0, or heal by training"
        )
    block, found = stack.blocks[index], []
    for kind in (block.sublayers[-1].kind,) if kinds is None else kinds:
        sublayer = next((s for s in block.sublayers if s.kind == kind), None)
        if sublayer is None:
            raise ArchitectureError(_no_sublayer(stack, index, kind))
        module = _matrix_of(sublayer, outputs)
        found.append(Projection(names[module], module, sublayer, scale))
    return found


@contextlib.contextmanager
def _recorded(stack: Stack, blocks: Sequence[int]) -> Iterator[tuple[dict[Any, Tensor], dict[int, Tensor]]]:
    """Record the outputs of every matrix, sublayer and block, and the inputs of the blocks."""
    outputs: dict[Any, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def keep_output(module: nn.Module, args: object, output: Any) -> None:
        outputs[module] = first(output)

    def keep_input(module: nn.Module, args: tuple[Tensor, ...], kwargs: Facts, index: int) -> None:
        inputs[index] = args[0] if args else kwargs["hidden_states"]

    handles = []
    for index in blocks:
        block = stack.blocks[index]
        watched = {block.module, *(s.module for s in block.sublayers)}
        watched |= {m for s in block.sublayers for m in s.module.modules() if isinstance(m, MATRICES)}
        handles += [module.register_forward_hook(keep_output) for module in watched]
        handles.append(block.module.register_forward_pre_hook(partial(keep_input, index=index), with_kwargs=True))
    try:
        yield outputs, inputs
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
