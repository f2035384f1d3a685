"""The config.json of a pruned checkpoint: the original's file, of which only what concerns blocks changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from excise.errors import CheckpointError
from excise.models.architectures import Architecture
from excise.surgery.config import kept_blocks, pruned_config
from excise.surgery.quantisation import CONFIG_KEYS as SETTINGS


def pruned_raw_config(
    raw: dict[str, Any], config: Any, architecture: Architecture, removed: Sequence[int]
) -> dict[str, Any]:
    """Return a config.json for the model without the blocks `removed`, with all fields that transformers does not know.

    `pruned_config` says what changes; those values replace the original's, under every spelling that stands in the
    file. Lists with one entry a block are written even where the original leaves them to a default, since defaults
    count from the new bottom. Blocks for multi-token prediction, which guess from the whole stack's output, are gone.

    Args:
        raw: parsed config.json of the original; left as it is.
        config: the transformers config read from it.
        architecture: names the fields.
        removed: sorted original indices.

    Raises:
        InputError: `removed` does not fit the stack.
        ArchitectureError: a per-block list has another length than the stack, or no config describes what is left.
        CheckpointError: a multimodal model's file does not say what its text model is.

    """
    pruned = pruned_config(config, architecture, removed)
    original, text = config.get_text_config(decoder=True), pruned.get_text_config(decoder=True)
    result = copy.deepcopy(raw)
    whole = original is config
    if not whole and not isinstance(raw.get("text_config"), dict):
        raise CheckpointError("config.json leaves its text_config to defaults; expected it written out. Add it")
    place, raw_place = (result, raw) if whole else (result["text_config"], raw["text_config"])
    _write_changes(place, original, text, always=architecture.per_block_keys)
    kept = kept_blocks(original.num_hidden_layers, removed)
    for key in {"num_hidden_layers", *architecture.per_block_keys} & raw_place.keys():
        if place[key] == raw_place[key]:  # a spelling of other loaders, which the transformers config does not write
            place[key] = len(kept) if key == "num_hidden_layers" else _cut(raw_place[key], kept)
    for key in (key for key in architecture.extra_blocks if raw_place.get(key)):
        place[key] = 0
    place.update({key: getattr(text, key) for key in architecture.derived_keys})
    return result


def _write_changes(result: dict[str, Any], config: Any, pruned: Any, always: Sequence[str]) -> None:
    """Put what differs between two configs into `result`, under every spelling that stands there."""
    before, after = config.to_dict(), pruned.to_dict()
    own_names = dict(getattr(config, "attribute_map", None) or {})
    for key, value in after.items():
        if value is None or key in SETTINGS or (before.get(key) == value and key not in always):
            continue
        aliases = (alias for alias, own in own_names.items() if own == key and alias in result)
        result.update(dict.fromkeys((key, *aliases), value))


def _cut(values: Any, kept: Sequence[int]) -> Any:
    cut = [values[i] for i in kept]
    return "".join(cut) if isinstance(values, str) else cut
