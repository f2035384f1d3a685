"""How the output of a module inside a block comes to the residual stream: found by trying, on a few tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from excise.models.stack import Block, Sublayer, first, replace_first
from excise.plain import Facts

MATRICES = (nn.Linear, Conv1D)

Call = tuple[tuple[Any, ...], Facts]  # arguments of a module


@dataclass(frozen=True, eq=False)
class Way:
    """How a module's output is added to the residual stream: times a constant, and times a gate of each token.

    Attributes:
        scale: the constant.
        gate: the module whose output [tokens, 1] is that gate's logit; None where there is no gate.

    """

    scale: float
    gate: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """A block's pass over a few tokens, which can be repeated with another output of a module inside.

    Attributes:
        block: the block.
        again: repeats the pass, giving the stream [1, tokens, width] after the block.
        stream: the same of the first pass.
        outputs: of its sublayers' modules, and of the matrices inside them.
        calls: arguments of its sublayers' modules.

    """

    block: Block
    again: Callable[[], Tensor]
    stream: Tensor
    outputs: Mapping[nn.Module, Tensor]
    calls: Mapping[nn.Module, Call]

    @staticmethod
    @torch.no_grad()
    def of(block: Block, again: Callable[[], Tensor]) -> Probe:
        """Send the tokens through for the first time."""
        outputs: dict[nn.Module, Tensor] = {}
        calls: dict[nn.Module, Call] = {}

        def keep_output(module: nn.Module, args: object, output: Any) -> None:
            outputs[module] = first(output)

        def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: Facts) -> None:
            calls[module] = args, kwargs

        with contextlib.ExitStack() as hooks:
            for sublayer in _added(block):
                hooks.callback(sublayer.module.register_forward_pre_hook(keep_call, with_kwargs=True).remove)
                for module in {sublayer.module, *matrices_of(sublayer)}:
                    hooks.callback(module.register_forward_hook(keep_output).remove)
            stream = again()
        return Probe(block, again, stream, outputs, calls)

    @torch.no_grad()
    def way(self, sublayer: Sublayer, module: nn.Module) -> Way | None:
        """How a module's output is added to the stream while all other sublayers give what they gave.

        Args:
            sublayer: of the block.
            module: the sublayer's, or a matrix inside it.

        Returns:
            None where the stream is anything else but the rest plus a multiple of that output, token by token.

        """
        output = self.outputs.get(module)
        if output is None or output.shape[-1] != self.stream.shape[-1] or output.numel() != self.stream.numel():
            return None
        other = self._other(output)
        changed = self._with(sublayer, module, other)
        moved = changed.double() - self.stream.double()
        sent = (other.double() - output.double()).reshape(moved.shape)
        # A few roundings of what is added up are no reason to refuse. Number by number: beside the few that are huge in
        # many streams, a function of the output that is not linear would not be seen.
        dtype = max(self.stream.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        summands = (self.stream, changed, *(self.outputs[each.module] for each in _added(self.block)))
        size = torch.stack([summand.double().abs().reshape(moved.shape) for summand in summands]).sum(dim=0)
        allowed = 8 * torch.finfo(dtype).eps * size
        gates = [m for m in matrices_of(sublayer) if m in self.outputs and self.outputs[m].shape[-1] == 1]
        for gate in (*gates, None):
            weighted = sent if gate is None else sent * self.outputs[gate].double().sigmoid().reshape(1, -1, 1)
            scale = float((moved * weighted).sum() / weighted.square().sum())
            if scale != 0 and ((moved - scale * weighted).abs() <= allowed).all():
                # Less the noise of rounding, so that 1 is 1.
                return Way(float(torch.tensor(scale, dtype=dtype)), gate)
        return None

    def _other(self, output: Tensor) -> Tensor:
        """Another output of a module, as large as the stream; tokens differ in size, which a norm would undo."""
        generator = torch.Generator().manual_seed(0)
        tokens, width = self.stream.shape[-2:]
        noise = (2 * torch.rand(tokens, width, generator=generator) - 1) * torch.linspace(0.25, 1, tokens).unsqueeze(1)
        noise = noise.to(self.stream.device) * self.stream.abs().max().clamp(min=1e-3).float()
        return noise.reshape(output.shape).to(output.dtype)

    def _with(self, sublayer: Sublayer, module: nn.Module, output: Tensor) -> Tensor:
        """The stream if a module gave another output, and the other sublayers what they gave."""
        given = {other.module: self.outputs[other.module] for other in _added(self.block) if other is not sublayer}
        with contextlib.ExitStack() as hooks:
            for changed, tensor in {**given, module: output}.items():
                hook = partial(_replaced, tensor=tensor)
                hooks.callback(changed.register_forward_hook(hook).remove)
            return self.again()


def matrices_of(sublayer: Sublayer) -> list[Any]:
    """The linear modules inside a sublayer's module, or that module itself."""
    return [module for module in sublayer.module.modules() if isinstance(module, MATRICES)]


def _added(block: Block) -> Iterator[Sublayer]:
    """A block's sublayers but its scale, whose module is the block."""
    return (sublayer for sublayer in block.sublayers if sublayer.module is not block.module)


def _replaced(module: nn.Module, args: object, output: Any, tensor: Tensor) -> Any:
    return replace_first(output, tensor)
