"""What ties blocks to each other or to their place: shared keys and values, a last block of a fixed type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from excise.models.architectures import Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def kv_sources(config: PretrainedConfig, architecture: Architecture) -> tuple[int | None, ...]:
    """For each block [blocks], the index of the block whose keys and values it uses instead of its own, or None.

    Args:
        config: config of the text model.
        architecture: names the config property, if any.

    """
    if architecture.kv_sharing is None:
        return (None,) * config.num_hidden_layers
    modes, types = getattr(config, architecture.kv_sharing), config.layer_types
    stored = {types[i]: i for i, mode in enumerate(modes) if mode == "store"}
    return tuple(stored[types[i]] if mode == "reuse" else None for i, mode in enumerate(modes))


def fixed_blocks(config: PretrainedConfig, architecture: Architecture) -> Mapping[int, str]:
    """Blocks that cannot be removed without changing others, each with the reason.

    Args:
        config: config of the text model.
        architecture: says what ties the blocks.

    """
    fixed: dict[int, str] = {}
    users: dict[int, list[int]] = {}
    for block, source in enumerate(kv_sources(config, architecture)):
        if source is not None:
            users.setdefault(source, []).append(block)
    for source, blocks in users.items():
        fixed[source] = f"blocks {listed(blocks)} use its keys and values"
    last = config.num_hidden_layers - 1
    if architecture.last_type and last not in fixed:
        fixed[last] = f"transformers makes the last block '{architecture.last_type}', whatever stands there"
    return fixed


def needed_blocks(config: PretrainedConfig, architecture: Architecture) -> tuple[int, ...]:
    """Blocks of which at least one must stay; () where there is no such condition.

    Args:
        config: config of the text model.
        architecture: names the type.

    """
    # Without any full-attention block transformers cannot generate with a cache: `get_seq_length` fails (log,
    # 2026-11-24, hybrids in transformers 5.23).
    if architecture.needed_type is None:
        return ()
    return tuple(i for i, entry in enumerate(config.layer_types) if entry == architecture.needed_type)


def listed(blocks: Sequence[int]) -> str:
    """Write sorted indices with runs shortened.

    Examples:
        >>> listed([3, 4, 5, 9])
        '3–5, 9'

    """
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
