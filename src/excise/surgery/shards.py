"""Writing safetensors shards from byte ranges of others, and from memory."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from excise.errors import InputError
from excise.models.headers import INDEX, SINGLE, Tensor
from excise.plain import Facts
from excise.surgery.byte_copy import copy_range, copy_slices
from excise.surgery.changed import Changed

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str | int) -> int:
    """Read a size such as "5GB" or "500MiB", or a number of bytes.

    Raises:
        InputError: it is something else, or not positive.

    Examples:
        >>> parse_size("5GB"), parse_size(1000)
        (5000000000, 1000)

    """
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]I?B)?\s*", str(size).upper())
    if match is None or int(match[1]) == 0:
        raise InputError(f"expected a size such as 5GB or 500MiB, got {size!r}")
    return int(match[1]) * UNITS.get(match[2], 1)


def write_shards(
    tensors: Iterable[Tensor | Changed], metadata: Mapping[str, str], folder: Path, max_shard_size: str | int = "5GB"
) -> list[Path]:
    """Write tensors, in the order given, as a checkpoint: `model.safetensors`, or shards with an index.

    Tensors of other files cost no memory: the system copies the bytes from file to file, in ranges as long as they lie
    so.

    Args:
        tensors: what to write, under the names they are to have.
        metadata: `__metadata__` of every shard.
        folder: an existing folder.
        max_shard_size: upper size of a shard's tensors, such as "5GB"; a single larger tensor has a shard of its own.

    Returns:
        The files written.

    Raises:
        CheckpointError: a shard became shorter meanwhile, or a changed tensor exceeds its dtype's range.
        InputError: the size cannot be read.
        OSError: the disk is full or fails.

    """
    groups = _group(tensors, parse_size(max_shard_size))
    if len(groups) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    weight_map: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        _write_shard(folder / name, group, metadata)
        weight_map |= dict.fromkeys((tensor.name for tensor in group), name)
    if len(groups) > 1:
        total = sum(tensor.bytes for group in groups for tensor in group)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names.append(INDEX)
    return [folder / name for name in names]


def _group(tensors: Iterable[Tensor | Changed], limit: int) -> list[list[Tensor | Changed]]:
    groups: list[list[Tensor | Changed]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.bytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.bytes
    return groups


def _write_shard(path: Path, tensors: list[Tensor | Changed], metadata: Mapping[str, str]) -> None:
    header: Facts = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8, as the library's do
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        target.flush()
        for first, count in _runs(tensors):
            if isinstance(first, Changed):
                target.write(first.to_bytes())
                target.flush()
                continue
            with first.shard.open("rb") as source:
                if first.slices is None:
                    copy_range(source.fileno(), target.fileno(), first.start, count, str(first.shard))
                else:
                    copy_slices(source.fileno(), target.fileno(), first.start, first.slices, str(first.shard))


def _runs(tensors: list[Tensor | Changed]) -> list[tuple[Tensor | Changed, int]]:
    """First tensor and bytes of each run to copy, in order; neighbours in the source become one run."""
    runs: list[tuple[Tensor | Changed, int]] = []
    nowhere = end = (Path(), -1)
    for tensor in tensors:
        if isinstance(tensor, Changed):
            runs.append((tensor, tensor.bytes))
            end = nowhere
        elif (tensor.shard, tensor.start) == end and tensor.slices is None:
            runs[-1] = (runs[-1][0], runs[-1][1] + tensor.bytes)
            end = (tensor.shard, tensor.start + tensor.bytes)
        else:
            runs.append((tensor, tensor.bytes))
            end = (tensor.shard, tensor.start + tensor.bytes) if tensor.slices is None else nowhere
    return runs
