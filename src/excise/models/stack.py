"""The stack of a loaded model: its blocks, their sublayers (one gate each), and what follows the last block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import ARCHITECTURES, Architecture, SublayerRecord, architecture_of
from excise.models.constraints import fixed_blocks, kv_sources, needed_blocks
from excise.plain import Plain, Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE = "scale"


@dataclass(frozen=True, eq=False)
class Sublayer:
    """A module whose output is added to the residual stream, with the gate that multiplies it.

    Attributes:
        gate: index of the gate, counted over the whole stack.
        block: index of the block it belongs to.
        kind: "attention", "feed-forward", "moe", …
        module: the module whose output the gate multiplies.
        inner: modules before it in the same residual branch, where `module` is a post-norm.
        writes: names inside the block of the parameters that are 0 where the sublayer adds nothing; empty where it
            only goes with its block.
        share: the part of the module's output that the gate multiplies, 1 but for the "scale" of a block that ends
            by multiplying the residual stream by s: there, the module is the block and the share 1 − 1/s, so that a
            gate at 0 undoes the multiplication.

    """

    gate: int
    block: int
    kind: str
    module: nn.Module
    inner: tuple[nn.Module, ...] = ()
    writes: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def name(self) -> str:
        """Readable name, such as `12.attention`."""
        return f"{self.block}.{self.kind}"

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self._own_parameters())

    @property
    def bytes(self) -> int:
        """Bytes of its parameters as loaded."""
        return sum(p.numel() * p.element_size() for p in self._own_parameters())

    def _own_parameters(self) -> list[nn.Parameter]:
        modules = (self.module, *self.inner) if self.kind != SCALE else ()
        return [parameter for module in modules for parameter in module.parameters()]


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
        fixed: block index → why that block cannot be removed.
        needed: blocks of which at least one must stay, for generation with a cache to work; () where all may go.

    """

    model: PreTrainedModel
    architecture: Architecture
    blocks: tuple[Block, ...]
    fixed: Mapping[int, str] = field(default_factory=dict)
    needed: tuple[int, ...] = ()

    @property
    def config(self) -> Any:
        """Config of the text model, which in a multimodal model lies inside the whole config."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers [gates], in order of computation."""
        return tuple(sublayer for block in self.blocks for sublayer in block.sublayers)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        return self.model.get_input_embeddings().weight.device

    @property
    def shares_kv(self) -> bool:
        """Whether blocks use keys and values of blocks below them, so that they need more than a residual stream."""
        return any(source is not None for source in kv_sources(self.config, self.architecture))

    def hidden(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Final hidden states [batch, tokens, width], after the final norm, before the vocabulary head.

        Sequences are padded on the right: causal attention then needs no padding mask.
        """
        # Without the head: only counted tokens go through it, a few at a time.
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Apply the vocabulary head to final hidden states [..., width], giving float32 logits [..., vocabulary]."""
        config, record = self.config, self.architecture
        head = self.model.get_output_embeddings()
        if head.weight.is_floating_point():
            # A residual stream in float32 ends wider than the head.
            hidden = hidden.to(head.weight.dtype)
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if record.logit_divisor:
            logits = logits / getattr(config, record.logit_divisor)
        if record.logit_multiplier:
            logits = logits * getattr(config, record.logit_multiplier)
        if record.logit_softcap and (cap := getattr(config, record.logit_softcap)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def find_stack(model: PreTrainedModel) -> Stack:
    """Read a loaded transformers causal language model as a stack of blocks.

    Puts the model in evaluation mode, and checks on a few tokens that hidden states and head reproduce its logits, and
    that every block gives its input back where its sublayers add nothing.

    Args:
        model: a `PreTrainedModel` with a language-model head.

    Raises:
        ArchitectureError: the model type is unknown, or this model does not fit its record.

    """
    record = _record_of(model)
    config = model.config.get_text_config(decoder=True)
    for key, wanted in record.required.items():
        if getattr(config, key, wanted) != wanted:
            raise ArchitectureError(
                f"this {record.model_type} has {key}={getattr(config, key)!r}, so its blocks depend on their place "
                f"in the stack and none can be removed without changing the others; only {key}={wanted!r} is supported"
            )
    try:
        modules = list(model.get_submodule(record.stack))
    except AttributeError as error:
        raise ArchitectureError(
            f"this model does not look like the {record.model_type} excise knows: {error}"
        ) from None
    blocks: list[Block] = []
    gate = 0
    for index, module in enumerate(modules):
        sublayers = _sublayers(module, record, index, gate)
        gate += len(sublayers)
        blocks.append(Block(index, module, sublayers))
    if model.get_output_embeddings() is None:
        raise ArchitectureError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    # Dropout would make two passes differ, and a measured damage with them.
    model.eval()
    stack = Stack(model, record, tuple(blocks), fixed_blocks(config, record), needed_blocks(config, record))
    _check_head(stack)
    _check_gates(stack)
    return stack


def _record_of(model: PreTrainedModel) -> Architecture:
    if model.config.model_type in ARCHITECTURES:
        return ARCHITECTURES[model.config.model_type]
    from excise.models.finder import find_record  # which imports this module

    try:
        proposal = f"a forward pass of this one suggests:\n{find_record(model).record()}"
    except ArchitectureError as reason:
        proposal = f"but {reason}"
    try:
        return architecture_of(model.config.model_type)
    except ArchitectureError as error:
        raise ArchitectureError(f"{error}; {proposal}") from None


def submodule(module: nn.Module, path: str) -> Any:
    """Return what stands at a dotted path inside a module (a module or a parameter), or None."""
    found: Plain = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _sublayers(block: nn.Module, record: Architecture, index: int, gate: int) -> tuple[Sublayer, ...]:
    """Sublayers that this block has, in the record's order; `gate` is the first one's."""
    found: dict[str, SublayerRecord] = {}
    for entry in record.sublayers:
        # The first record that fits wins: a hybrid's blocks have modules of one name and several kinds.
        fits = not entry.present or submodule(block, entry.present) is not None
        if fits and entry.module not in found and submodule(block, entry.module) is not None:
            found[entry.module] = entry
    if not found:
        expected = ", ".join(dict.fromkeys(entry.module for entry in record.sublayers))
        raise ArchitectureError(
            f"this model does not look like the {record.model_type} excise knows: block {index} "
            f"({type(block).__name__}) has none of {expected}"
        )
    names = [name for name, _ in block.named_parameters()]
    sublayers = []
    for entry in found.values():
        inner = tuple(module for path in entry.inner if (module := submodule(block, path)) is not None)
        writes = tuple(n for n in names for path in entry.writes if n == path or n.startswith(f"{path}."))
        sublayers.append(Sublayer(gate, index, entry.kind, submodule(block, entry.module), inner, writes))
        gate += 1
    if record.scale and (scale := float(submodule(block, record.scale))) != 1:
        if scale == 0:
            raise ArchitectureError(f"block {index} multiplies the residual stream by 0: nothing below it can matter")
        # At gate 0 the block's output is divided by its scale, which undoes the multiplication.
        sublayers.append(Sublayer(gate, index, SCALE, block, share=1 - 1 / scale))
    return tuple(sublayers)


def _probe(stack: Stack) -> Tensor:
    return torch.arange(4, device=stack.device).unsqueeze(0) % stack.config.vocab_size


@torch.no_grad()
def _check_head(stack: Stack) -> None:
    tokens = _probe(stack)
    # Asked, not believed: Gemma3ForConditionalGeneration applies no final softcap where Gemma3ForCausalLM does (log,
    # 2026-11-24, hybrids in transformers 5.23).
    expected = stack.model(input_ids=tokens, use_cache=False).logits.float()
    ours = stack.logits(stack.hidden(tokens)).float()
    difference = (expected - ours).abs().max().item()
    if difference > 1e-3 * max(1.0, expected.abs().max().item()):
        raise ArchitectureError(
            f"final hidden states and head of this {stack.architecture.model_type} give logits that differ from the "
            f"model's own by {difference:.3g}; its record in excise.models.architectures lacks a step between the two"
        )


@torch.no_grad()
def _check_gates(stack: Stack) -> None:
    """With all gates at 0, every block must return what it was given: gate 0 ≡ block removed."""
    wrong: dict[int, float] = {}

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int) -> None:
        given, returned = block_input(args, kwargs), first(output)
        difference = (returned.double() - given.double()).abs().max().item()
        # Negated, so that NaN counts as wrong.
        if not difference <= 1e-3 * given.double().abs().max().item():
            wrong[index] = difference

    off = np.ones(len(stack.sublayers), dtype=bool)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(silent(stack, off))
        for block in stack.blocks:
            hook = partial(compare, index=block.index)
            hooks.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.hidden(_probe(stack))
    if wrong:
        index, difference = next(iter(wrong.items()))
        raise ArchitectureError(
            f"with the sublayers that the {stack.architecture.model_type} record names at 0, {len(wrong)} of "
            f"{len(stack.blocks)} blocks still change the residual stream (block {index} by {difference:.3g}), so "
            f"gates would not mean removal; `excise inspect MODEL --find` shows what this model adds to its stream"
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


def removable_indices(stack: Stack, removed: Sequence[int]) -> tuple[int, ...]:
    """Return `removed` as `block_indices` does, if these blocks can be removed.

    Raises:
        InputError: an index is outside the stack, or given twice.
        ArchitectureError: a block is tied to others that stay, or to its place.

    """
    indices = block_indices(stack, removed)
    for index in indices:
        if index in stack.fixed:
            raise ArchitectureError(f"block {index} cannot be removed: {stack.fixed[index]}")
    return indices


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
            # The class's own forward shows again once the instance's is gone.
            module.__dict__.pop("forward", None)
            if earlier is not None:
                module.__dict__["forward"] = earlier


def bypass(stack: Stack, removed: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Context in which the blocks `removed` pass their input on unchanged and cost nothing.

    Raises:
        InputError: an index is outside the stack, or given twice.
        ArchitectureError: other blocks depend on one of them.

    """
    modules = (stack.blocks[i].module for i in removable_indices(stack, removed))
    return override_forward(dict.fromkeys(modules, pass_through(stack)))


def pass_through(stack: Stack) -> Callable[..., Any]:
    """Forward of a bypassed block: returns the hidden states it is given, in the form that blocks of `stack` do."""
    return lambda *args, **kwargs: block_output(stack, block_input(args, kwargs))


def block_input(args: Sequence[Any], kwargs: Values) -> Tensor:
    """Return the hidden states among the arguments of a block's forward."""
    return args[0] if args else kwargs["hidden_states"]


def block_output(stack: Stack, hidden_states: Tensor) -> Any:
    """Return hidden states in the form that blocks of `stack` return them."""
    return (hidden_states,) if stack.architecture.returns_tuple else hidden_states


@contextlib.contextmanager
def gated(stack: Stack, alpha: Float[Tensor, " gates"]) -> Iterator[None]:
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

    def hook_of(index: int, share: float) -> Callable[..., Any]:
        if share == 1:
            return lambda module, args, output: replace_first(output, first(output) * alpha[index])
        return lambda module, args, output: replace_first(output, first(output) * (1 - share * (1 - alpha[index])))

    handles = []
    try:
        for sublayer in stack.sublayers:
            index = sublayer.block if per_block else sublayer.gate
            # A product with 1 would change nothing, and cost memory for its backward pass.
            if alpha.requires_grad or alpha[index] != 1:
                handles.append(sublayer.module.register_forward_hook(hook_of(index, sublayer.share)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def silent(stack: Stack, off: Bool[np.ndarray, " gates"]) -> Iterator[None]:
    """Context in which the sublayers `off` [gates, boolean] run but add nothing to the residual stream."""

    def hook(module: nn.Module, args: Any, output: Any, share: float) -> Any:
        tensor = first(output)
        # Zeros, not 0 × output: an overflow times 0 is NaN.
        return replace_first(output, torch.zeros_like(tensor) if share == 1 else tensor * (1 - share))

    handles = [s.module.register_forward_hook(partial(hook, share=s.share)) for s in stack.sublayers if off[s.gate]]
    try:
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
