"""A record proposed for a model that excise does not know, from what a forward pass does.

Nothing is taken from names but what things are called. A block list is one whose elements run in order, each on the
hidden states that the one before returned. A block's sublayers are modules whose outputs, each times a constant, sum to
what the block adds to those hidden states; of modules with the same output, the outermost; of sums, the shortest. The
proposal is then tried: with these outputs at 0, every block must return its input.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from excise.errors import ArchitectureError
from excise.models.stack import block_input, first, replace_first
from excise.plain import Facts, Plain, Values

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 12
MOST_SUBLAYERS = 4
# Of the norm of what a block adds: outputs are rounded before they are added.
SUM_TOLERANCE = 1e-4
INDEX_NAME = re.compile(r"(layer|block)_?(idx|index|id|number)?$")
# In this order: names of a hybrid's modules often hold two of them.
KINDS = (
    ("per-layer-input", ("per_layer",)),
    ("moe", ("moe", "expert")),
    ("linear-attention", ("linear_attn", "deltanet")),
    ("attention", ("attn", "attention")),
    ("mamba", ("mamba", "ssm")),
    ("convolution", ("conv",)),
    ("feed-forward", ("mlp", "ffn", "feed_forward", "feedforward", "fc2", "fc_out")),
)


@dataclass(frozen=True)
class Variant:
    """What one module path is in some of the blocks.

    Attributes:
        kind: what names suggest; "unknown" if nothing.
        present: path that these blocks have and those where the module is another kind have not; "" if there are none.
        writes: the module inside that computes the output last, if one does.

    """

    kind: str
    present: str
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What the finder proposes for a model.

    Attributes:
        model_type: of the model's config.
        stack: path of the block list from the model.
        sublayers: for each block, the modules (paths inside the block) whose outputs it adds, in order of computation.
        factors: for each block, the constants by which it multiplies them.
        variants: module path → what it is, by kind.
        index_attributes: attributes inside a block that hold its index.
        per_block_keys: config lists as long as the stack; whether they mean blocks only a reader of the model can say.
        numbers: other config entries that may count or place blocks, likewise.
        returns_tuple: whether blocks return a tuple.

    """

    model_type: str
    stack: str
    sublayers: tuple[tuple[str, ...], ...]
    factors: tuple[tuple[float, ...], ...]
    variants: Mapping[str, tuple[Variant, ...]]
    index_attributes: tuple[str, ...]
    per_block_keys: tuple[str, ...]
    numbers: Values
    returns_tuple: bool

    def record(self) -> str:
        """Python lines of a record to put into a family file, with a comment at whatever needs a reader's judgement."""
        lines = ["Architecture(", f'    "{self.model_type}",', f'    stack="{self.stack}",', "    sublayers=("]
        for path, variants in self.variants.items():
            for variant in variants:
                writes = f", writes={_quoted(variant.writes)}" if variant.writes else ""
                present = f', present="{variant.present}"' if variant.present else ""
                lines.append(f'        SublayerRecord("{variant.kind}", "{path}"{writes}{present}),')
        doubt = "  # lists as long as the stack: do they hold one entry a block?" if self.per_block_keys else ""
        lines += ["    ),", f"    per_block_keys={_quoted(self.per_block_keys)},{doubt}"]
        lines += [f"    index_attributes={_quoted(self.index_attributes)},"]
        lines += ["    returns_tuple=True,"] if self.returns_tuple else []
        lines.append(")")
        if self.numbers:
            entries = ", ".join(f"{key}={value!r}" for key, value in self.numbers.items())
            lines.append(f"# does any of these count, place or list blocks (positions, index_lists)? {entries}")
        constants = sorted({round(factor, 4) for factors in self.factors for factor in factors} - {1.0})
        if constants:
            lines.append(f"# outputs are multiplied by {', '.join(map(str, constants))} before they are added")
        return "\n".join(lines)


def _quoted(values: Sequence[str]) -> str:
    return "(" + "".join(f'"{value}", ' for value in values).rstrip(" " if len(values) == 1 else ", ") + ")"


def find_record(model: PreTrainedModel) -> Found:
    """Propose a record for a causal language model in memory, known or not.

    Args:
        model: a transformers model with a language-model head; put into evaluation mode, otherwise left as it is.

    Raises:
        ArchitectureError: the model is no residual stack: no list of blocks runs in order, or a block does not add
            outputs of its modules to its input.

    """
    model.eval()
    config = model.config.get_text_config(decoder=True)
    tokens = torch.arange(TOKENS, device=model.device).unsqueeze(0) % config.vocab_size
    stack, blocks = _block_list(model, tokens)
    seen = [_observe(model, tokens, block) for block in blocks]
    sums = [
        _added(block, observed, path=f"{stack}.{i}")
        for i, (block, observed) in enumerate(zip(blocks, seen, strict=True))
    ]
    sublayers = tuple(paths for paths, _ in sums)
    _try(model, tokens, stack, blocks, sublayers)
    return Found(
        model.config.model_type,
        stack,
        sublayers,
        tuple(factors for _, factors in sums),
        _variants(blocks, seen, sublayers),
        _index_attributes(blocks),
        *_config_entries(config, len(blocks)),
        all(observed.in_tuple for observed in seen),
    )


@torch.no_grad()
def _run(model: PreTrainedModel, tokens: Tensor) -> None:
    model(input_ids=tokens, use_cache=False)


@contextlib.contextmanager
def _hooks(modules: Mapping[Any, nn.Module], hook: Any) -> Iterator[None]:
    """Context in which `hook(key, module, args, kwargs, output)` runs after each of `modules`."""
    handles = [m.register_forward_hook(partial(hook, key), with_kwargs=True) for key, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_states(value: Plain) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def _block_list(model: PreTrainedModel, tokens: Tensor) -> tuple[str, list[nn.Module]]:
    """The list of modules that pass hidden states on to each other, the longest if there are several."""
    lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    passes: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in lists}

    def hook(key: tuple[str, int], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not args and "hidden_states" not in kwargs:
            return
        given, returned = block_input(args, kwargs), first(output)
        if _is_states(given) and _is_states(returned) and given.shape == returned.shape:
            passes[key[0]].append((key[1], given, returned))

    with _hooks({(name, i): m for name, items in lists.items() for i, m in enumerate(items)}, hook):
        _run(model, tokens)
    chains = {}
    for name, steps in passes.items():
        in_order = [index for index, _, _ in steps] == list(range(len(lists[name])))
        linked = all(torch.equal(a[2], b[1]) for a, b in itertools.pairwise(steps))
        if in_order and linked:
            chains[name] = sum(p.numel() for module in lists[name] for p in module.parameters())
    if not chains:
        names = ", ".join(lists) or "none"
        raise ArchitectureError(
            f"{type(model).__name__} is no stack of blocks that pass hidden states on to each other "
            f"(lists of modules in it: {names}), so no block can be removed from it"
        )
    # Towers beside the language model may be chains too; the stack is the heaviest.
    stack = max(chains, key=lambda name: chains[name])
    return stack, lists[stack]


@dataclass(frozen=True)
class _Observed:
    """Hidden states before and after a block, and outputs of its modules of that size, in order, all [elements]."""

    before: Tensor
    after: Tensor
    outputs: Mapping[str, Tensor]
    in_tuple: bool


def _observe(model: PreTrainedModel, tokens: Tensor, block: nn.Module) -> _Observed:
    given: list[Tensor] = []
    outputs: dict[str, Tensor] = {}
    tuples: list[bool] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(_flat(block_input(args, kwargs)))

    def leave(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _is_states(first(output)) and first(output).numel() == given[0].numel():
            outputs[path] = _flat(first(output))
        if path == "":
            tuples.append(isinstance(output, tuple))

    before = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _hooks(dict(block.named_modules()), leave):
            _run(model, tokens)
    finally:
        before.remove()
    return _Observed(given[0], outputs.pop(""), outputs, tuples[0])


def _flat(tensor: Tensor) -> Tensor:
    # Cloned, since blocks may add to their streams in place afterwards.
    return tensor.double().reshape(-1).clone()


def _added(block: nn.Module, seen: _Observed, path: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Paths and factors of the shortest sum of module outputs that is what the block adds to its input."""
    candidates: dict[str, Tensor] = {}
    for name, output in sorted(seen.outputs.items(), key=lambda item: item[0].count(".")):
        if output.norm() > 0 and not any(_same(output, other) for other in (seen.before, *candidates.values())):
            candidates[name] = output
    # In the order in which they ran, which sorting by depth has lost.
    order = [name for name in seen.outputs if name in candidates]
    delta = seen.after - seen.before
    for count in range(1, MOST_SUBLAYERS + 1):
        for names in itertools.combinations(order, count):
            columns = torch.stack([candidates[name] for name in names], dim=1)
            factors = torch.linalg.lstsq(columns, delta).solution
            close = (columns @ factors - delta).norm() <= SUM_TOLERANCE * delta.norm()
            # A factor of 0 means that the module has no part in the sum.
            if close and factors.abs().min() > SUM_TOLERANCE:
                return names, tuple(factors.tolist())
    raise ArchitectureError(
        f"{path} ({type(block).__name__}) is no residual block: what it changes in its input is not a sum of up to "
        f"{MOST_SUBLAYERS} outputs of its modules (tried: {', '.join(order) or 'none of the right size'}), "
        f"so gates cannot stand for removal"
    )


def _try(
    model: PreTrainedModel, tokens: Tensor, stack: str, blocks: Sequence[nn.Module], sublayers: Sequence[Sequence[str]]
) -> None:
    """Check the proposal as a whole: with every sublayer at 0, each block returns its input."""
    wrong: list[int] = []

    def silence(key: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return replace_first(output, torch.zeros_like(first(output)))

    def compare(index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.allclose(first(output).double(), block_input(args, kwargs).double(), rtol=1e-4, atol=1e-6):
            wrong.append(index)

    gates = {(i, path): b.get_submodule(path) for i, b in enumerate(blocks) for path in sublayers[i]}
    with _hooks(gates, silence), _hooks(dict(enumerate(blocks)), compare):
        _run(model, tokens)
    if wrong:
        raise ArchitectureError(
            f"{stack}.{wrong[0]} is no residual block: it changes its input even where "
            f"{', '.join(sublayers[wrong[0]])} give 0"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=0)


def _variants(
    blocks: Sequence[nn.Module], seen: Sequence[_Observed], sublayers: Sequence[Sequence[str]]
) -> dict[str, tuple[Variant, ...]]:
    """What each module path is, with the paths in order of computation."""
    places: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, list[int]]] = {}
    for i, paths in enumerate(sublayers):
        for place, path in enumerate(paths):
            places.setdefault(path, []).append(place / len(paths))
            kinds.setdefault(path, {}).setdefault(_kind(blocks[i], path), []).append(i)
    order = sorted(kinds, key=lambda path: sum(places[path]) / len(places[path]))
    return {
        path: tuple(
            Variant(kind, _only_in(blocks, path, mine, kinds[path]), _last_writer(blocks, seen, path, mine))
            for kind, mine in kinds[path].items()
        )
        for path in order
    }


def _only_in(blocks: Sequence[nn.Module], path: str, mine: Sequence[int], kinds: Mapping[str, Sequence[int]]) -> str:
    """A path that all blocks `mine` have, and none where the module is of another kind; "" if all are of one."""
    children = {
        i: {name for name, _ in blocks[i].get_submodule(path).named_children()} for k in kinds.values() for i in k
    }
    common = set.intersection(*(children[i] for i in mine))
    others = set().union(*(children[i] for i in children if i not in mine))
    own = [name for name, _ in blocks[mine[0]].get_submodule(path).named_children() if name in common - others]
    return f"{path}.{own[0]}" if own and len(kinds) > 1 else ""


def _last_writer(
    blocks: Sequence[nn.Module], seen: Sequence[_Observed], path: str, mine: Sequence[int]
) -> tuple[str, ...]:
    """The module with weights at or under `path` whose output is the sublayer's, in all blocks `mine`."""
    names = [name for name in seen[mine[0]].outputs if name == path or name.startswith(f"{path}.")]
    for name in names:
        weighted = hasattr(blocks[mine[0]].get_submodule(name), "weight") and "norm" not in name
        if weighted and all(
            name in seen[i].outputs and _same(seen[i].outputs[name], seen[i].outputs[path]) for i in mine
        ):
            return (name,)
    return ()


def _kind(block: nn.Module, path: str) -> str:
    """What the names of a module say it is: its class without the model's own name, its path, what is inside."""
    module = block.get_submodule(path)
    own = {type(m).__name__ for m in block.modules() if type(m).__module__ == type(block).__module__}
    shared = (
        itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*own, strict=False)) if len(own) > 1 else ()
    )
    bare = type(module).__name__.removeprefix("".join(letters[0] for letters in shared))
    inside = [name for name, _ in module.named_modules()]
    if "experts" in inside:
        return "moe"
    for text in (bare, path, type(module).__name__, " ".join(inside)):
        for kind, hints in KINDS:
            if any(hint in text.lower() for hint in hints):
                return kind
    return "unknown"


def _index_attributes(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Attributes that equal the block's index in every block that has them."""
    values: dict[str, list[bool]] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool) and INDEX_NAME.search(name):
                    values.setdefault(f"{path}.{name}".lstrip("."), []).append(value == index)
    return tuple(name for name, equal in values.items() if all(equal))


def _config_entries(config: PretrainedConfig, blocks: int) -> tuple[tuple[str, ...], Facts]:
    """Config lists as long as the stack, and entries named after layers or blocks."""
    lists: list[str] = []
    numbers: Facts = {}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == blocks:
            lists.append(key)
        elif re.search(r"layer|block", key) and "norm" not in key and key not in ("num_hidden_layers", "n_layer"):
            numbers |= {key: value} if isinstance(value, int | list) and not isinstance(value, bool) else {}
    return tuple(lists), numbers
