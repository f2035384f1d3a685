"""The config of a pruned model: every field that counts, lists or points at blocks, in step with the blocks kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import Architecture


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


def pruned_config(config: Any, architecture: Architecture, removed: Sequence[int]) -> Any:
    """Return a copy of a transformers config for the model without the blocks `removed`.

    The block count is lowered; lists with one entry a block are cut; positions, which count blocks from the bottom, are
    recounted; lists of block indices are filtered and renumbered. Only the fields that the architecture names are
    touched: a list that happens to be as long as the stack may mean something else. The marks of a GGUF file, which say
    that weights are quantised, are dropped: loaded weights no longer are.

    Args:
        config: config of the original model; left as it is.
        architecture: names the fields.
        removed: original indices.

    Raises:
        InputError: `removed` does not fit the stack.
        ArchitectureError: a per-block list has another length than the stack.

    """
    blocks = config.num_hidden_layers
    kept = kept_blocks(blocks, removed)
    pruned = copy.deepcopy(config)
    pruned.num_hidden_layers = len(kept)  # transformers writes it under the architecture's own spelling (n_layer, …)
    for key in architecture.per_block_keys:
        if (values := getattr(config, key, None)) is not None:
            if len(values) != blocks:
                raise ArchitectureError(
                    f"config field {key} has {len(values)} entries for {blocks} blocks; expected one a block. "
                    f"Correct the original's config.json"
                )
            setattr(pruned, key, [values[i] for i in kept])
    for key in architecture.positions:
        if (position := getattr(config, key, None)) is not None:
            # A position may lie above the stack (max_window_layers often does); it then stays above it.
            setattr(pruned, key, position - sum(i < position for i in removed))
    for key in architecture.index_lists:
        if (indices := getattr(config, key, None)) is not None:
            setattr(pruned, key, [kept.index(i) for i in indices if i in kept])
    if quantisation(config) == "gguf":
        del pruned.quantization_config
    return pruned


def quantisation(config: Any) -> str | None:
    """How the weights are quantised, as `quant_method` of the config says ("gguf", "bitsandbytes", …), or None."""
    marks = getattr(config, "quantization_config", None)
    if marks is None:
        return None
    method = marks.get("quant_method") if isinstance(marks, dict) else getattr(marks, "quant_method", None)
    return str(getattr(method, "value", method))
