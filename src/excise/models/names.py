"""Names of a checkpoint's tensors, as transformers' loader reads them.

One model's checkpoints come in several spellings: with or without the base model's prefix, from before a renaming,
experts one by one or fused; and some hold tensors that the loader drops. What it does is asked, not copied.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from excise.models.architectures import Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SETTINGS = ("quantization_config", "compression_config")
# Buffers that old checkpoints hold and transformers drops for every model that computes them.
COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


class Names:
    """How the loader of one model reads names.

    Args:
        model: a transformers model; one without content, on the meta device, will do.

    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._keys = model.state_dict()
        self._tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        buffers = [name for name, _ in model.named_buffers()]
        computed = {pattern for end, pattern in COMPUTED.items() if any(name.endswith(end) for name in buffers)}
        self._computed = [re.compile(pattern) for pattern in sorted(computed)]
        self._dropped = [re.compile(pattern) for pattern in sorted(model._keys_to_ignore_on_load_unexpected or ())]

    @property
    def elements(self) -> int:
        """Numbers in the model's state dict, tied ones under each of their names."""
        return sum(tensor.numel() for tensor in self._keys.values())

    def key(self, name: str) -> str | None:
        """Name in the model's state dict of what a tensor becomes, alone or fused with others; None if nothing."""
        return self._read(name)[0]

    def is_converted(self, name: str) -> bool:
        """Whether the loader changes a tensor's layout: fuses it with others, splits or transposes it."""
        return self._read(name)[1] is not None

    def is_dropped(self, name: str) -> bool:
        """Whether the loader knows this name as that of a part which its model is without."""
        key, _, renamed = self._read(name)
        return key is None and any(pattern.search(renamed) for pattern in self._dropped)

    def is_computed(self, name: str) -> bool:
        """Whether a tensor is a table that the model computes itself."""
        key, _, renamed = self._read(name)
        return key is None and any(pattern.search(renamed) for pattern in self._computed)

    def parameter(self, name: str) -> int | str | None:
        """What tells the parameter of a tensor from others, the same for tied ones; None where it is none.

        A tensor that the loader neither takes nor drops counts by its own name: what it is, is not known.
        """
        key = self.key(name)
        if key is None:
            return None if self.is_dropped(name) or self.is_computed(name) else name
        return self._tied.get(key)

    def block_prefixes(self, names: Iterable[str], record: Architecture) -> tuple[str, ...]:
        """Under which names the tensors of the blocks stand among `names`, each followed by `.index.`."""
        stacks = "|".join(re.escape(stack) for stack in (record.stack, without_prefix(record.stack)))
        found: dict[str, None] = {}
        for name in names:
            for reading in (name, self._read(name)[2]):
                if (match := re.match(rf"(?:{stacks})\.(\d{{1,6}})\.", reading)) and f".{match[1]}." in name:
                    found[name[: name.index(f".{match[1]}.")]] = None
                    break
        return tuple(found)

    def _read(self, name: str) -> tuple[str | None, str | None, str]:
        """Key in the model, pattern of a converter, and the name with its renamings."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._keys)
        if renamed not in self._keys and name in self._keys:
            return name, None, name
        return (renamed if renamed in self._keys else None), pattern, renamed


def without_prefix(path: str) -> str:
    """Name inside the base model of what has this name in the whole model."""
    return path.partition(".")[2] or path


def names_in(config: PretrainedConfig) -> Names | None:
    """How the model that a checkpoint was saved from reads its names; None where transformers has no such model.

    That is the class which the config names, so that a multimodal model's towers and a classifier's head are its own.
    """
    config = copy.deepcopy(config)
    for key in SETTINGS:
        if hasattr(config, key):
            delattr(config, key)
    saved_from: Any = getattr(transformers, (config.architectures or [""])[0], None)
    own = isinstance(saved_from, type) and issubclass(saved_from, PreTrainedModel)
    with torch.device("meta"):
        if own and isinstance(config, saved_from.config_class):
            return Names(saved_from(config))
        try:
            return Names(AutoModelForCausalLM.from_config(config))
        except ValueError:  # no such model for this config
            return None
