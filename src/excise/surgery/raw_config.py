"""The config.json of a pruned checkpoint: the original's file, of which only what concerns blocks changes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from excise.errors import CheckpointError
from excise.models.architectures import Architecture
from excise.plain import Facts, Plain
from excise.surgery.config import kept_blocks, pruned_config
from excise.surgery.quantisation import CONFIG_KEYS as SETTINGS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def pruned_raw_config(
    raw: Facts, config: PretrainedConfig, architecture: Architecture, removed: Sequence[int]
) -> Facts:
    """Return a config.json for the model without the blocks `removed`, with all fields that transformers does not know.

    `pruned_config` says what changes; those values replace the original's, under every spelling that stands in the
    file. Lists with one entry a block are cut as they stand there, in the file's words for the kinds of blocks, which
    transformers may read as others that older versions of it refuse. Where the original leaves such a list to a default
    it is written, since defaults count from the new bottom. Blocks for multi-token prediction, which guess from the
    whole stack's output, are gone.

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
    blocks = original.num_hidden_layers
    kept = kept_blocks(blocks, removed)
    spellings = {key: _spellings(original, key) for key in architecture.per_block_keys}
    standing = {name for names in spellings.values() for name in names if _is_list(raw_place.get(name), blocks)}
    said = any(_is_list(raw_place.get(key), blocks) for key in architecture.derived_keys)
    always = [key for key, names in spellings.items() if not said and not standing & set(names)]
    others = {name for names in spellings.values() for name in names} - set(always)
    _write_changes(place, original, text, always=always, never=others)
    place.update({key: _cut(raw_place[key], kept) for key in standing})
    if "num_hidden_layers" in raw_place:  # perhaps a spelling of other loaders, which transformers does not write
        place["num_hidden_layers"] = len(kept)
    for key in (key for key in architecture.extra_blocks if raw_place.get(key)):
        place[key] = 0
    place.update({key: getattr(text, key) for key in architecture.derived_keys})
    return result


def _spellings(config: PretrainedConfig, key: str) -> tuple[str, ...]:
    """Names that a config class has for one field."""
    own_names = dict(getattr(config, "attribute_map", None) or {})
    own = own_names.get(key, key)
    return (own, *(alias for alias, name in own_names.items() if name == own))


def _is_list(value: Plain, blocks: int) -> bool:
    """Whether a value has one entry a block; a string has its letters."""
    return isinstance(value, list | str) and len(value) == blocks


def _write_changes(
    result: Facts, config: PretrainedConfig, pruned: Any, always: Collection[str], never: Collection[str]
) -> None:
    """Put what differs between two configs into `result`, under every spelling that stands there."""
    before, after = config.to_dict(), pruned.to_dict()
    own_names = dict(getattr(config, "attribute_map", None) or {})
    for key, value in after.items():
        if value is None or key in SETTINGS or key in never or (before.get(key) == value and key not in always):
            continue
        aliases = (alias for alias, own in own_names.items() if own == key and alias in result)
        result.update(dict.fromkeys((key, *aliases), value))


def _cut(values: Plain, kept: Sequence[int]) -> Any:
    cut = [values[i] for i in kept]
    return "".join(cut) if isinstance(values, str) else cut
