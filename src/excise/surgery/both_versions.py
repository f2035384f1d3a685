"""A checkpoint as transformers 5 saves it, in the spelling that transformers 4.57 reads too.

Version 5 gathers what concerns rotary embeddings in `rope_parameters`, calls every fast tokenizer TokenizersBackend,
and spells some counts anew. Version 4.57 takes defaults for the first without a word (a base of 10,000) and refuses the
second. Version 5 reads the spellings of 4.57 as well; that it reads the same is checked.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from excise.artefacts import read_json, write_json
from excise.plain import Facts, Plain

# Where a model type of version 4.57 has names of its own for what all others call rope_theta and partial_rotary_factor.
ROTARY_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# One embedding for each type of attention (Gemma 3): the sliding one has a base of its own.
FULL, SLIDING, SLIDING_BASE = "full_attention", "sliding_attention", "rope_local_base_freq"
# Where version 4.57 has names of its own for kinds of blocks, and refuses others.
KINDS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
TOKENIZER = "PreTrainedTokenizerFast"  # which in both versions is all that tokenizer.json says, and no more


def write_for_both(folder: Path) -> None:
    """Respell config.json and tokenizer_config.json of a folder that transformers 5 just saved.

    What cannot be respelled so that version 5 still reads the same stays as it is.
    """
    path = folder / "config.json"
    values, expected = read_json(path), _as_read(folder)
    for respelled in (_with_old_dtype, _with_old_rotary, _with_old_counts, _with_old_kinds, _with_plain_numbers):
        candidate = respelled(values)
        write_json(path, candidate)
        if (read := _as_read(folder)) and all(read.get(key) == value for key, value in expected.items()):
            values = candidate
    write_json(path, values)
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        _respell_tokenizer(folder / "tokenizer_config.json")


def _as_read(folder: Path) -> Facts:
    """What version 5 makes of a config.json; empty where it refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a spelling is the old one is what is wanted
        try:
            return AutoConfig.from_pretrained(folder).to_dict()
        except Exception:  # whatever a config class makes of fields that do not fit it
            return {}


def _everywhere(values: Facts, change: Any) -> Facts:
    """Change a config and those inside it."""
    inside = {k: _everywhere(v, change) if isinstance(v, dict) and "model_type" in v else v for k, v in values.items()}
    return change(inside)


def _with_old_dtype(values: Facts) -> Facts:
    return _everywhere(values, lambda part: {("torch_dtype" if k == "dtype" else k): v for k, v in part.items()})


def _with_old_rotary(values: Facts) -> Facts:
    return _everywhere(values, _old_rotary)


def _old_rotary(part: Facts) -> Facts:
    rotary = part.get("rope_parameters")
    if not isinstance(rotary, dict):
        return part
    names = ROTARY_NAMES.get(str(part.get("model_type")), {})
    result = {key: value for key, value in part.items() if key != "rope_parameters"}
    if isinstance(rotary.get(FULL), dict):
        sliding = rotary.get(SLIDING) or {}
        if sliding.get("rope_theta") is not None:
            result[SLIDING_BASE] = sliding["rope_theta"]
        rotary = rotary[FULL]
    for key in ("rope_theta", "partial_rotary_factor"):
        if rotary.get(key) is not None:
            result[names.get(key, key)] = rotary[key]
    if rotary.get("rope_type", "default") != "default":
        result["rope_scaling"] = {k: v for k, v in rotary.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return result


def _with_old_counts(values: Facts) -> Facts:
    """The count of experts under the name that most model types of version 4.57 have for it."""

    def respelled(part: Facts) -> Facts:
        model_type = part.get("model_type")
        if model_type is None:
            return part
        aliases = dict(type(AutoConfig.for_model(model_type)).attribute_map or {})
        own = aliases.get("num_experts")
        return {"num_experts": part[own], **part} if own in part else part

    return _everywhere(values, respelled)


def _with_old_kinds(values: Facts) -> Facts:
    def respelled(part: Facts) -> Facts:
        names = KINDS.get(str(part.get("model_type")))
        if names is None or not isinstance(kinds := part.get("layer_types"), list):
            return part
        return {**part, "layer_types": [names.get(kind, kind) for kind in kinds]}

    return _everywhere(values, respelled)


def _with_plain_numbers(value: Plain) -> Any:
    """Infinity as a number, which version 5 writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_plain_numbers(entry) for key, entry in value.items()}
    return [_with_plain_numbers(entry) for entry in value] if isinstance(value, list) else value


def _respell_tokenizer(path: Path) -> None:
    values = {key: value for key, value in read_json(path).items() if key not in ("backend", "is_local")}
    values["tokenizer_class"] = TOKENIZER
    if isinstance(further := values.pop("extra_special_tokens", None), list):
        values["additional_special_tokens"] = further
    elif further is not None:
        values["extra_special_tokens"] = further
    write_json(path, values)
