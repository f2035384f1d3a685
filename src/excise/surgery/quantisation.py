"""Names of modules in quantisation settings, renumbered after a removal.

Every tool keeps lists of modules that it did, or did not, quantise: `exclude_modules`, `quantized_layers` (ModelOpt),
`ignore`, `targets` (compressed-tensors), `modules_to_not_convert` (transformers), `dynamic` (GPTQModel). They name
blocks by absolute index, as plain names, with shell wildcards or as regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Any

from excise.errors import CheckpointError
from excise.plain import Facts, Plain

CONFIG_KEYS = ("quantization_config", "compression_config")
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
REGULAR_EXPRESSION = ("re:", "+:", "-:")  # marks of compressed-tensors and GPTQModel


def renumbered(settings: Plain, prefixes: Sequence[str], new_index: Mapping[int, int | None]) -> Any:
    """Return quantisation settings in which every name of a block has the block's new index.

    Looks at all lists of text and all keys, however deep, and leaves the rest as it is. Names of removed blocks are
    dropped, and so is a group of settings that had targets and has none left.

    Args:
        settings: parsed JSON.
        prefixes: names under which the blocks stand, such as "model.layers".
        new_index: original index → new one, or None where the block is removed.

    Raises:
        CheckpointError: a pattern picks blocks in a way that cannot be renumbered.

    Examples:
        >>> renumbered({"ignore": ["lm_head", "model.layers.2.mlp", "model.layers.3*"]}, ["model.layers"],
        ...            {0: 0, 1: 1, 2: None, 3: 2})
        {'ignore': ['lm_head', 'model.layers.2.*']}

    """
    if isinstance(settings, dict):
        result: Facts = {}
        for key, value in settings.items():
            kept = renumbered(value, prefixes, new_index)
            if _lost_its_targets(value, kept):
                continue
            result |= dict.fromkeys(_renumbered_name(key, prefixes, new_index), kept)
        return result
    if isinstance(settings, list):
        entries: list[Any] = []
        for entry in settings:
            names = _renumbered_name(entry, prefixes, new_index) if isinstance(entry, str) else None
            entries += [renumbered(entry, prefixes, new_index)] if names is None else names
        return entries
    return settings


def _lost_its_targets(before: Any, after: Any) -> bool:
    return isinstance(before, dict) and bool(before.get("targets")) and not after.get("targets")


def _renumbered_name(name: str, prefixes: Sequence[str], new_index: Mapping[int, int | None]) -> list[str]:
    """Names that stand for `name` after the removal: none, one, or one a block where a wildcard picks several."""
    is_expression = name.startswith(REGULAR_EXPRESSION) or "\\" in name
    for head, dot, index, rest in _splits(name, is_expression):
        if not _names_the_stack(head, prefixes) or not re.search(r"\d", index):
            continue
        if index.isdecimal() and (rest or not is_expression):
            new = new_index.get(int(index))
            return [] if new is None else [f"{head}{dot}{new}{rest}"]
        picked = _picked(index, new_index, is_expression, name)
        rest = "$" if index.endswith("$") else rest or (r"\..*" if is_expression else ".*")
        return [f"{head}{dot}{new}{rest}" for new in picked]
    return [name]


def _splits(name: str, is_expression: bool) -> list[tuple[str, str, str, str]]:
    """All ways to read a name as (head, dot, one component, rest); in expressions a dot may be escaped.

    A dot that is followed by a quantifier belongs to its component: in `layers.1.*` read as an expression, `1.*` picks
    1 and 10 alike.
    """
    separator = r"\\\.|\.(?![*+?{])" if is_expression else r"\."
    dots = list(re.finditer(separator, name))
    ends = [dot.start() for dot in dots[1:]] + [len(name)] * bool(dots)
    return [
        (name[: dot.start()], dot.group(), name[dot.end() : end], name[end:])
        for dot, end in zip(dots, ends, strict=True)
    ]


def _names_the_stack(head: str, prefixes: Sequence[str]) -> bool:
    """Whether the text before an index ends as a block list's name does: in full, or with less or more before it."""
    literal = re.split(r"[*+?\[\]()|^:]", head.replace("\\.", "."))[-1]
    relative = literal.removeprefix(".")
    after_wildcard = literal != head
    for prefix in prefixes:
        if literal == prefix or literal.endswith(f".{prefix}") or prefix.endswith(f".{relative}"):
            return True
        if after_wildcard and relative and prefix.endswith(relative):
            return True
    return False


def _picked(index: str, new_index: Mapping[int, int | None], is_expression: bool, name: str) -> list[int]:
    # An expression matches from the start only: with nothing after the index, 1 picks 1, 10, 11, …
    expression = f"(?:{index.removesuffix('$')})" + ".*" * index.isdecimal() if is_expression else translate(index)
    try:
        pattern = re.compile(expression)
    except re.error:
        raise CheckpointError(
            f"the quantisation settings pick blocks by {name!r}, which cannot be renumbered; name the modules one by "
            f"one in the original's config"
        ) from None
    return [new for old, new in new_index.items() if new is not None and pattern.fullmatch(str(old))]
