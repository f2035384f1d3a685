"""For which readers a removal is right: what remains must stand in the pattern that a reader takes from the index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

from excise.errors import ArchitectureError, InputError
from excise.ising.problem import Pattern
from excise.models.architectures import Architecture
from excise.models.architectures.readers import READERS
from excise.models.architectures.record import Placement
from excise.plain import Facts, Values

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Portability:
    """What each reader makes of a pruned checkpoint.

    Attributes:
        right: readers that take every block for what it is.
        wrong: reader → which block it takes for what. Most do so without a word.
        without: readers that do not know the model type.

    """

    right: tuple[str, ...]
    wrong: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def describe(self) -> Facts:
        """Plain values for the recipe."""
        return {"right": list(self.right), "wrong": dict(self.wrong)}


def portability(
    architecture: Architecture, config: PretrainedConfig, removed: Sequence[int], raw: Values | None = None
) -> Portability:
    """Say for which readers the model without the blocks `removed` is right, as far as their code is known.

    Args:
        architecture: says what readers take from the index of a block.
        config: the original's transformers config; of a multimodal model, the whole.
        removed: original indices; () asks of the original itself.
        raw: parsed config.json, where there is one: transformers drops some periods that others read.

    """
    known = {name: reader for name, reader in READERS.items() if architecture.model_type not in reader.without}
    found = {name: _misreading(architecture, config, removed, name, raw) for name in known}
    return Portability(
        right=tuple(name for name, reason in found.items() if reason is None),
        wrong={name: reason for name, reason in found.items() if reason is not None},
        without=tuple(name for name in READERS if name not in known),
    )


def rules_of(
    architecture: Architecture, config: PretrainedConfig, raw: Values | None = None
) -> dict[str, tuple[str, ...]]:
    """What each reader that knows this model type takes from the index of a block, in words; () where nothing.

    Args:
        architecture: says what readers take from the index of a block.
        config: the transformers config; of a multimodal model, the whole.
        raw: parsed config.json, where there is one.

    """
    rules: dict[str, tuple[str, ...]] = {
        name: () for name, reader in READERS.items() if architecture.model_type not in reader.without
    }
    for placement in architecture.placements:
        if _kinds(placement, config) is not None:
            places = _Places.of(placement, config, raw)
            rule = f"{placement.key} is {placement.last} in one block in {places.period}, else {placement.usual}"
            rules[placement.reader] = (*rules[placement.reader], rule)
    return rules


def keeps_pattern(
    architecture: Architecture,
    config: PretrainedConfig,
    removed: Sequence[int],
    readers: Iterable[str],
    raw: Values | None = None,
) -> bool:
    """Whether every one of `readers` takes each block that stays for what it is; arguments as for `portability`."""
    return all(_misreading(architecture, config, removed, reader, raw) is None for reader in readers)


def require_portable(
    architecture: Architecture,
    config: PretrainedConfig,
    removed: Sequence[int],
    readers: Iterable[str],
    raw: Values | None = None,
) -> None:
    """Refuse a removal that one of `readers` would read wrongly; arguments as for `portability`.

    Raises:
        InputError: no such reader.
        ArchitectureError: one does not know this model type, or would take a block for another kind.

    """
    for reader in _known(architecture, readers):
        if reason := _misreading(architecture, config, removed, reader, raw):
            raise ArchitectureError(
                f"{READERS[reader].title} {reason}. Remove so that the others keep the pattern, as "
                f"`excise solve --portable {reader}` does, or leave {reader} out of --portable"
            )


def pattern_of(
    architecture: Architecture, config: PretrainedConfig, readers: Iterable[str], raw: Values | None = None
) -> Pattern | None:
    """The condition under which a removal is right for all of `readers`; None where every removal is.

    Args:
        architecture: says what readers take from the index of a block.
        config: the original's transformers config; of a multimodal model, the whole.
        readers: names in `READERS`.
        raw: parsed config.json, where there is one.

    Raises:
        InputError: no such reader.
        ArchitectureError: one does not know this model type.

    """
    patterns = patterns_of(architecture, config, raw)
    return combined(patterns[name] for name in _known(architecture, readers))


def patterns_of(
    architecture: Architecture, config: PretrainedConfig, raw: Values | None = None
) -> dict[str, Pattern | None]:
    """For each reader that knows this model type, the condition under which a removal is right; as `pattern_of`."""
    patterns: dict[str, Pattern | None] = {
        name: None for name, reader in READERS.items() if architecture.model_type not in reader.without
    }
    for placement in architecture.placements:
        if (kinds := _kinds(placement, config)) is not None:
            places = _Places.of(placement, config, raw)
            rows = (tuple(kind == places.kind(place) for place in range(places.period)) for kind in kinds)
            pattern = Pattern(tuple(rows), name=f"the pattern of {READERS[placement.reader].title}")
            patterns[placement.reader] = combined([patterns[placement.reader], pattern])
    return patterns


def combined(patterns: Iterable[Pattern | None]) -> Pattern | None:
    """The condition that all patterns are kept; None where there is none."""
    return reduce(lambda both, pattern: both.both(pattern) if both else pattern, filter(None, patterns), None)


@dataclass(frozen=True)
class _Places:
    """What a reader takes the block at each place for."""

    period: int
    usual: object
    last: object

    @classmethod
    def of(cls, placement: Placement, config: PretrainedConfig, raw: Values | None) -> _Places:
        values = config.to_dict() if raw is None else raw
        written = _text_part(values).get(placement.period_key or "")
        period = written if isinstance(written, int) and written > 0 else placement.period
        return cls(period, placement.usual, placement.last)

    def kind(self, place: int) -> object:
        return self.usual if (place + 1) % self.period else self.last


def _text_part(values: Values) -> Values:
    inner = values.get("text_config")
    return inner if isinstance(inner, Mapping) else values


def _kinds(placement: Placement, config: PretrainedConfig) -> list[Any] | None:
    return getattr(config.get_text_config(decoder=True), placement.key, None)


def _known(architecture: Architecture, readers: Iterable[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(readers))
    for name in names:
        if name not in READERS:
            raise InputError(f"expected readers in {', '.join(READERS)}, got '{name}'")
        if architecture.model_type in READERS[name].without:
            raise ArchitectureError(f"{READERS[name].title} does not know {architecture.model_type}; leave {name} out")
    return names


def _misreading(
    architecture: Architecture, config: PretrainedConfig, removed: Sequence[int], reader: str, raw: Values | None
) -> str | None:
    """What a reader takes wrongly, first of all; None where it is right."""
    gone = set(removed)
    for placement in (p for p in architecture.placements if p.reader == reader):
        kinds = _kinds(placement, config)
        if kinds is None:
            continue
        places = _Places.of(placement, config, raw)
        kept = (block for block in range(len(kinds)) if block not in gone)
        for place, block in enumerate(kept):
            if kinds[block] != places.kind(place):
                return (
                    f"computes {placement.key} from the index, one in {places.period}: block {block}, then {place}, "
                    f"counts as {places.kind(place)} and is {kinds[block]}"
                )
    return None
