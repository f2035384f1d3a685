"""The tensors of a safetensors checkpoint as byte ranges: headers are read and checked, bytes are never decoded."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from excise.errors import CheckpointError, InputError
from excise.plain import Facts, Plain

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
# Bytes, as in the safetensors library.
LARGEST_HEADER = 100_000_000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Slices:
    """A part of a tensor: of its bytes, seen as [outer, total, unit], those of `kept` in the middle."""

    outer: int
    total: int
    unit: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor where it lies.

    Attributes:
        name: as in the header.
        dtype: as in the header, such as "BF16" or "F8_E4M3".
        shape: as in the header; a packed tensor's is that of its packing.
        shard: the file.
        start: absolute offset of its first byte in the file.
        bytes: their number.
        slices: if only a part is meant, which; `shape` and `bytes` are then those of the part.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    start: int
    bytes: int
    slices: Slices | None = None

    @property
    def elements(self) -> int:
        """Number of elements, as the header counts them."""
        return math.prod(self.shape)

    def renamed(self, name: str) -> Tensor:
        """Return the same bytes under another name."""
        return replace(self, name=name)

    def sliced(self, dimension: int, total: int, kept: Sequence[int]) -> Tensor:
        """Return the part made of the slices `kept`, of `total` equal ones along a dimension.

        Raises:
            CheckpointError: the dimension is not divided evenly, or a slice would not be whole bytes.

        """
        outer = math.prod(self.shape[:dimension])
        width, odd = divmod(self.shape[dimension], total) if dimension < len(self.shape) else (0, 1)
        unit, broken = divmod(self.bytes, outer * total) if outer else (0, 0)
        if odd or broken:
            raise CheckpointError(f"{self.name}, {self.dtype} {list(self.shape)}, is no row of {total} equal slices")
        shape = (*self.shape[:dimension], width * len(kept), *self.shape[dimension + 1 :])
        size = outer * unit * len(kept)
        return replace(self, shape=shape, bytes=size, slices=Slices(outer, total, unit, tuple(kept)))


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder: `tensors` in the order in which they lie on disk, and the shards' common metadata."""

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint folder: one `model.safetensors`, or shards with an index.

    Nothing but JSON is read, so a folder from anywhere may be opened. Every tensor must be in exactly one shard, and in
    the one that the index names.

    Raises:
        InputError: no such folder.
        CheckpointError: no safetensors weights (pickle files are not read), or an adapter beside them; the index is
            damaged, names files outside the folder, or disagrees with the shards; a shard is missing, truncated or
            corrupt.

    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; expected a checkpoint folder with safetensors weights")
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}) beside the weights, and transformers would load both as one model; "
            f"merge the adapter into the weights (peft's merge_and_unload) and save that, or move adapter_* elsewhere"
        )
    # Where both exist, transformers takes this one, too.
    if (folder / SINGLE).is_file():
        tensors, metadata = read_header(folder / SINGLE)
        return Checkpoint(tensors, metadata)
    if (folder / INDEX).is_file():
        return _read_sharded(folder, _weight_map(folder / INDEX))
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has pickle weights only, which can run code when opened and are not read; convert them to "
            f"safetensors first"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; expected safetensors weights")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _json_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names; download it again")
    for name in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise CheckpointError(
                f"{index} names the file {name!r}; expected a plain .safetensors name in the same folder. "
                f"A checkpoint that points elsewhere is not to be trusted"
            )
    return weight_map


def _read_sharded(folder: Path, weight_map: Mapping[str, str]) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, which {INDEX} names; download it again")
        in_shard, shard_metadata = read_header(folder / file)
        metadata = shard_metadata | metadata
        for tensor in in_shard:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name} is in both {tensors[tensor.name].shard.name} and {file}; which one counts "
                    f"is not known. Download the checkpoint again"
                )
            if weight_map.get(tensor.name) != file:
                place = weight_map.get(tensor.name, "nowhere")
                raise CheckpointError(f"tensor {tensor.name} is in {file}, but {INDEX} has it in {place}")
            tensors[tensor.name] = tensor
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors that {INDEX} names are in no shard (first: {', '.join(absent[:3])}); "
            f"download {weight_map[absent[0]]} again"
        )
    return Checkpoint(tuple(tensors.values()), metadata)


def read_header(shard: str | Path) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    """Read and check a safetensors header.

    The format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes, which
    must follow each other without gap or overlap and end with the file.

    Returns:
        The tensors in the order of their bytes, and the `__metadata__`.

    Raises:
        CheckpointError: the file is truncated or its header is damaged, too long, or inconsistent.

    """
    shard = Path(shard)
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        # Before anything is read: a hostile length would be allocated.
        if length < 2 or length > min(LARGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{shard} is truncated or corrupt: its header claims {length:,} bytes, the file has {size:,} and at "
                f"most {LARGEST_HEADER:,} are allowed; download or copy it again"
            )
        header = _json_object(file.read(length), f"the header of {shard}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the header of {shard} has metadata that are not text; download or copy it again")
    data = 8 + length
    tensors = sorted((_tensor(name, entry, shard, data) for name, entry in header.items()), key=_place)
    end = data
    for tensor in tensors:
        if tensor.start != end:
            what = "overlap" if tensor.start < end else "leave a gap"
            raise CheckpointError(f"{shard} is corrupt: the bytes of tensors {what} before {tensor.name}")
        end += tensor.bytes
    if end != size:
        raise CheckpointError(
            f"{shard} is truncated or corrupt: its header describes {end:,} bytes, the file has {size:,}; "
            f"download or copy it again"
        )
    return tuple(tensors), metadata


def _place(tensor: Tensor) -> tuple[int, int]:
    # An empty tensor starts where the next one does, and must come before it.
    return tensor.start, tensor.bytes


def _tensor(name: str, entry: Plain, shard: Path, data: int) -> Tensor:
    """Read one entry of a header; `data` is where the shard's data begin."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        # `type` and not isinstance, for which true and false are integers.
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{shard} is corrupt: tensor {name} has no sound dtype, shape and data_offsets")
    if dtype not in BITS:
        raise CheckpointError(f"{shard}: tensor {name} has dtype {dtype!r}; known are {', '.join(BITS)}")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"{shard} is corrupt: tensor {name}, {dtype} {list(shape)}, needs "
            f"{math.prod(shape) * BITS[dtype] / 8:,.0f} bytes and has {end - begin:,}"
        )
    return Tensor(name, dtype, shape, shard, data + begin, end - begin)


def _json_object(text: bytes, what: str) -> Facts:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> Facts:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in result if names.count(name) > 1)
            raise CheckpointError(f"{what} has {twice!r} twice; which one counts is not known")
        return result

    try:
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON ({error}); download or copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is no JSON object; download or copy it again")
    return value
