"""The config of a pruned model: every field that counts, lists or points at blocks, in step with the blocks kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import Architecture
from excise.models.architectures.record import Period
from excise.models.constraints import kv_sources, listed, needed_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from excise.models.stack import Stack


def kept_blocks(blocks: int, removed: Sequence[int]) -> tuple[int, ...]:
    """Original indices of the blocks that stay, bottom to top.

    Args:
        blocks: blocks in the original stack.
        removed: original indices, each once.

    Raises:
        InputError: an index is outside the stack or named twice, or no block would be left.

    Examples:
        >>> kept_blocks(5, [1, 3])
        (0, 2, 4)

    """
    gone = set(removed)
    if len(gone) != len(removed) or not gone <= set(range(blocks)):
        raise InputError(f"removed blocks must be distinct and between 0 and {blocks - 1}, got {list(removed)}")
    if len(gone) == blocks:
        raise InputError(f"all {blocks} blocks are to be removed; at least one must stay")
    return tuple(i for i in range(blocks) if i not in gone)


def pruned_config(config: PretrainedConfig, architecture: Architecture, removed: Sequence[int]) -> Any:
    """Return a copy of a transformers config for the model without the blocks `removed`.

    The block count is lowered; lists with one entry a block are cut; positions and counts are recounted; lists of block
    indices are filtered and renumbered; periods are found anew. Only the fields that the architecture names are touched
    (and transformers' own overrides by index): a list that happens to be as long as the stack may mean something else.
    The marks of a GGUF file, which say that weights are quantised, are dropped: loaded weights no longer are.

    The result is read back as transformers will read it, and must then say of each kept block what the original said.

    Args:
        config: config of the original model, of a multimodal one the whole; left as it is.
        architecture: names the fields.
        removed: original indices.

    Raises:
        InputError: `removed` does not fit the stack.
        ArchitectureError: a per-block list has another length than the stack; or no config can describe the blocks that
            would be left, because others depend on a removed one or because types of blocks are placed by arithmetic.

    """
    pruned = copy.deepcopy(config)
    original, text = config.get_text_config(decoder=True), pruned.get_text_config(decoder=True)
    blocks = original.num_hidden_layers
    kept = kept_blocks(blocks, removed)
    _check_ties(original, architecture, kept)
    for key in architecture.per_block_keys:
        if (values := getattr(original, key, None)) is not None:
            if len(values) != blocks:
                raise ArchitectureError(
                    f"config field {key} has {len(values)} entries for {blocks} blocks; expected one a block. "
                    f"Correct the original's config.json"
                )
            setattr(text, key, [values[i] for i in kept])
    text.num_hidden_layers = len(kept)  # transformers writes it under the architecture's own spelling (n_layer, …)
    for key in architecture.positions:
        if (position := getattr(original, key, None)) is not None:
            setattr(text, key, recounted(position, removed))
    for key in architecture.top_counts:
        if count := getattr(original, key, None):
            setattr(text, key, sum(i >= blocks - count for i in kept))
    for key in architecture.index_lists:
        if (indices := getattr(original, key, None)) is not None:
            setattr(text, key, [kept.index(i) for i in indices if i in kept])
    for key in architecture.extra_blocks:
        if getattr(original, key, None):
            setattr(text, key, 0)
    for period in architecture.periods:
        _set_period(text, original, period, kept)
    if getattr(original, "is_heterogeneous", False):
        overrides = original.to_dict()["per_layer_config"]
        by_index = {int(index): values for index, values in overrides.items()}
        text.per_layer_config = {kept.index(i): values for i, values in by_index.items() if i in kept}
    if quantisation(config) == "gguf":
        del pruned.quantization_config
    _check_as_read(text, original, architecture, kept)
    return pruned


def recounted(position: int, removed: Sequence[int]) -> int:
    """Return how many of the first `position` blocks are left; a position above the stack stays as far above it.

    Examples:
        >>> recounted(3, [0, 4]), recounted(9, [0, 5])
        (2, 7)

    """
    return position - sum(i < position for i in removed)


def write_derived(folder: Path, config: PretrainedConfig, architecture: Architecture) -> None:
    """Write into a saved checkpoint's config.json what transformers derives and leaves out, for other loaders.

    Args:
        folder: checkpoint folder with a config.json.
        config: the config that was saved there.
        architecture: names the keys.

    """
    if architecture.derived_keys:
        path = folder / "config.json"
        text = config.get_text_config(decoder=True)
        values = json.loads(path.read_text(encoding="utf-8"))
        place = values if text is config else values["text_config"]
        place.update({key: getattr(text, key) for key in architecture.derived_keys})
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_ties(config: PretrainedConfig, architecture: Architecture, kept: Sequence[int]) -> None:
    for block, source in enumerate(kv_sources(config, architecture)):
        if block in kept and source is not None and source not in kept:
            raise ArchitectureError(
                f"block {source} cannot be removed while block {block} stays, which uses its keys and values"
            )
    needed = needed_blocks(config, architecture)
    if needed and not set(needed) & set(kept):
        raise ArchitectureError(
            f"one of the {architecture.needed_type} blocks {listed(needed)} must stay: transformers counts the tokens "
            f"in the cache of this {architecture.model_type} there, and cannot generate with a cache without one"
        )


def _set_period(text: Any, original: Any, period: Period, kept: Sequence[int]) -> None:
    """Find the period and offset that place the kept blocks of the special type where i % period == offset."""
    every, first = getattr(original, period.period), getattr(original, period.offset)
    blocks, places = len(kept), [place for place, i in enumerate(kept) if i % every == first]
    if places != list(range(first, blocks, every)):
        if not places:
            every, first = blocks + 1, blocks  # past the end: of experts, none may be left
        elif len(places) == 1:
            every, first = max(blocks, places[0] + 1), places[0]
        else:
            every, first = places[1] - places[0], places[0]
        if first >= every or (places and places != list(range(first, blocks, every))):
            raise ArchitectureError(
                f"{original.model_type} places blocks by {period.period} and {period.offset}, and no such pair puts "
                f"them at {places} of the {blocks} blocks left; choose blocks so that the others stay evenly spaced"
            )
    setattr(text, period.period, every)
    setattr(text, period.offset, first)


def _check_as_read(text: Any, original: Any, architecture: Architecture, kept: Sequence[int]) -> None:
    read = type(text).from_dict(text.to_dict())
    sources = kv_sources(original, architecture)
    facts = {
        "num_hidden_layers": (read.num_hidden_layers, len(kept)),
        "shared keys and values": (
            kv_sources(read, architecture),
            tuple(None if (s := sources[i]) is None else list(kept).index(s) for i in kept),
        ),
    }
    for key in (*architecture.per_block_keys, *(period.pattern for period in architecture.periods)):
        if (values := getattr(original, key, None)) is not None:
            facts[key] = (list(getattr(read, key)), [values[i] for i in kept])
    for key, (came, expected) in facts.items():
        if came != expected:
            raise ArchitectureError(
                f"transformers would read {key} of the pruned {architecture.model_type} as {came}, expected "
                f"{expected}; this removal cannot be written as a config, choose other blocks"
            )


def quantisation(config: PretrainedConfig) -> str | None:
    """How the weights are quantised, as `quant_method` of the config says ("gguf", "bitsandbytes", …), or None."""
    marks = getattr(config, "quantization_config", None)
    if marks is None:
        return None
    method = marks.get("quant_method") if isinstance(marks, dict) else getattr(marks, "quant_method", None)
    return str(getattr(method, "value", method))


def is_writable(stack: Stack, removed: Sequence[int]) -> bool:
    """Whether a config can describe the model without these blocks (some place blocks by a period, for example)."""
    try:
        pruned_config(stack.model.config, stack.architecture, removed)
    except ArchitectureError:
        return False
    return True
