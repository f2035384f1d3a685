"""The stack of a loaded model: its blocks, their sublayers (one gate each), and what follows the last block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import Architecture, architecture_of


@dataclass(frozen=True, eq=False)
class Sublayer:
    """A module whose output is added to the residual stream, with the gate that multiplies it.

    Attributes:
        gate: index of the gate, counted over the whole stack.
        block: index of the block it belongs to.
        kind: "attention", "feed-forward", "moe", …
        module: the module whose output the gate multiplies.
        inner: modules before it in the same residual branch, where `module` is a post-norm.

    """

    gate: int
    block: int
    kind: str
    module: nn.Module
    inner: tuple[nn.Module, ...] = ()

    @property
    def name(self) -> str:
        """Readable name, such as `12.attention`."""
        return f"{self.block}.{self.kind}"

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for module in (self.module, *self.inner) for p in module.parameters())

    @property
    def bytes(self) -> int:
        """Bytes of its parameters as loaded."""
        return sum(p.numel() * p.element_size() for module in (self.module, *self.inner) for p in module.parameters())


@dataclass(frozen=True, eq=False)
class Block:
    """A removable unit of the stack; `index` is its place in the original model."""

    index: int
    module: nn.Module
    sublayers: tuple[Sublayer, ...]

    @property
    def kind(self) -> str:
        """The kinds of its sublayers, joined by +."""
        return "+".join(sublayer.kind for sublayer in self.sublayers)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def bytes(self) -> int:
        """Bytes of its parameters as loaded."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


@dataclass(frozen=True, eq=False)
class Stack:
    """A causal language model seen as a stack of blocks.

    Attributes:
        model: the transformers model, in evaluation mode.
        architecture: the record by which it was read.
        blocks: [N], bottom to top.

    """

    model: Any
    architecture: Architecture
    blocks: tuple[Block, ...]

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers [gates], in order of computation."""
        return tuple(sublayer for block in self.blocks for sublayer in block.sublayers)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        return self.model.get_input_embeddings().weight.device

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Final hidden states [batch, tokens, width], after the final norm, before the vocabulary head.

        Sequences are padded on the right: causal attention then needs no padding mask.
        """
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the vocabulary head to final hidden states [..., width], giving float32 logits [..., vocabulary]."""
        config, record = self.model.config, self.architecture
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if record.logit_divisor:
            logits = logits / getattr(config, record.logit_divisor)
        if record.logit_multiplier:
            logits = logits * getattr(config, record.logit_multiplier)
        if record.logit_softcap and (cap := getattr(config, record.logit_softcap)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def find_stack(model: Any) -> Stack:
    """Read a loaded transformers causal language model as a stack of blocks.

    Puts the model in evaluation mode, and checks on a few tokens that hidden states and head reproduce its logits.

    Args:
        model: a `PreTrainedModel` with a language-model head.

    Raises:
        ArchitectureError: the model type is unknown, or this model does not fit its record.

    """
    config = model.config
    record = architecture_of(config.model_type)
    for key, wanted in record.required.items():
        if getattr(config, key, wanted) != wanted:
            raise ArchitectureError(
                f"this {config.model_type} has {key}={getattr(config, key)!r}, so its blocks depend on their place "
                f"in the stack and none can be removed without changing the others; only {key}={wanted!r} is supported"
            )
    try:
        modules = list(model.get_submodule(record.stack))
        blocks, gate = [], 0
        for index, module in enumerate(modules):
            sublayers = []
            for entry in record.sublayers:
                inner = tuple(module.get_submodule(path) for path in entry.inner)
                sublayers.append(Sublayer(gate, index, entry.kind, module.get_submodule(entry.module), inner))
                gate += 1
            blocks.append(Block(index, module, tuple(sublayers)))
    except AttributeError as error:
        raise ArchitectureError(
            f"this model does not look like the {config.model_type} excise knows: {error}"
        ) from None
    if model.get_output_embeddings() is None:
        raise ArchitectureError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    model.eval()
    stack = Stack(model, record, tuple(blocks))
    _check_head(stack)
    return stack


@torch.no_grad()
def _check_head(stack: Stack) -> None:
    tokens = torch.arange(4, device=stack.device).unsqueeze(0) % stack.model.config.vocab_size
    expected = stack.model(input_ids=tokens, use_cache=False).logits.float()
    ours = stack.logits(stack.hidden(tokens)).float()
    difference = (expected - ours).abs().max().item()
    if difference > 1e-3 * max(1.0, expected.abs().max().item()):
        raise ArchitectureError(
            f"final hidden states and head of this {stack.model.config.model_type} give logits that differ from the "
            f"model's own by {difference:.3g}; its record in excise.models.architectures lacks a step between the two"
        )


def block_indices(stack: Stack, removed: Sequence[int]) -> tuple[int, ...]:
    """Return `removed` sorted, as original indices; negative ones count from the top.

    Raises:
        InputError: an index is outside the stack, or given twice.

    """
    n = len(stack.blocks)
    outside = [i for i in removed if not -n <= i < n]
    if outside:
        raise InputError(f"block indices must be between 0 and {n - 1} (or negative, from the top), got {outside}")
    indices = sorted(i % n for i in removed)
    if len(set(indices)) != len(indices):
        raise InputError(f"a block is named twice in {sorted(removed)}")
    return tuple(indices)


@contextlib.contextmanager
def override_forward(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of some modules for the duration; wrappers from before (accelerate's) come back."""
    saved = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module, earlier in saved.items():
            module.__dict__.pop("forward", None)
            if earlier is not None:
                module.__dict__["forward"] = earlier


def bypass(stack: Stack, removed: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Context in which the blocks `removed` pass their input on unchanged and cost nothing."""
    modules = (stack.blocks[i].module for i in block_indices(stack, removed))
    return override_forward(dict.fromkeys(modules, pass_through))


def pass_through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Forward of a bypassed block."""
    return hidden_states


@contextlib.contextmanager
def gated(stack: Stack, alpha: Tensor) -> Iterator[None]:
    """Context in which every sublayer's output is multiplied by its gate (paper Eqs. 1–2).

    The explicit form of the gates: the reference that the fast gradient and the bypass are tested against.

    Args:
        stack: the model.
        alpha: gates [gates], or [blocks] to share one gate among a block's sublayers as the paper does. A gate that
            equals 1 and needs no gradient is left out of the forward.

    """
    per_block = alpha.numel() == len(stack.blocks)
    if not per_block and alpha.numel() != len(stack.sublayers):
        raise InputError(
            f"gates must number {len(stack.sublayers)} (sublayers) or {len(stack.blocks)} (blocks), got {alpha.numel()}"
        )

    def hook_of(index: int) -> Callable[..., Any]:
        return lambda module, args, output: replace_first(output, first(output) * alpha[index])

    handles = []
    try:
        for sublayer in stack.sublayers:
            index = sublayer.block if per_block else sublayer.gate
            if alpha.requires_grad or alpha[index] != 1:
                handles.append(sublayer.module.register_forward_hook(hook_of(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """Return the tensor a module returns, or the first of its tuple."""
    return output[0] if isinstance(output, tuple) else output


def replace_first(output: Any, tensor: Tensor) -> Any:
    """Return a module's output with its (first) tensor replaced."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor
