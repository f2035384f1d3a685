"""Pruning a GGUF file into a GGUF file: quantised tensors, metadata and tokenizer stay as they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from excise.artefacts import MADE_BY, require_free
from excise.errors import ArchitectureError, CheckpointError, InputError
from excise.models.architectures.readers import LLAMA_CPP_PERIODS
from excise.models.gguf_header import require_sound_gguf
from excise.plain import Facts
from excise.surgery.byte_copy import copy_range
from excise.surgery.config import kept_blocks
from excise.surgery.on_disk import original_indices, require_space
from excise.surgery.publish import Test, publishing
from excise.surgery.recipe import composed

# Metadata with one entry a block where they are lists (llama.cpp takes a number or a list), after the architecture.
PER_BLOCK = {
    "attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern", "feed_forward_length",
    "expert_feed_forward_length", "swiglu_clamp_exp", "swiglu_clamp_shexp",
}  # fmt: skip
NOT_PER_BLOCK = {"rope.dimension_sections"}
POSITIONS = ("leading_dense_block_count",)

PERIODS_IF_WINDOWED = {"olmo2": 4}
PERIOD_KEYS = {
    "attention.sliding_window_pattern": True,
    "full_attention_interval": True,
    "interleave_moe_layer_step": False,
}
INDEPENDENT = {
    "arcee", "command-r", "deepseek", "deepseek2", "dots1", "exaone", "falcon", "falcon-h1", "gemma", "glm4", "glm4moe",
    "gpt2", "gptneox", "granite", "granitehybrid", "granitemoe", "hunyuan-dense", "hunyuan-moe", "internlm2", "jamba",
    "lfm2", "lfm2moe", "llama", "mamba", "mamba2", "minicpm", "mistral3", "nemotron", "nemotron_h", "nemotron_h_moe",
    "olmo", "olmo2", "olmoe", "phi2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "stablelm",
    "starcoder2",
}  # fmt: skip
ORIGINAL, REMOVED, KEPT = RECIPE_KEYS = ("excise.original", "excise.removed", "excise.original_blocks")
MADE_BY_KEY = f"excise.{MADE_BY}"
SHARED = ("attention.shared_kv_layers",)

Entry = tuple[str, Any, gguf.GGUFValueType, gguf.GGUFValueType | None]  # key, value, type, type of a list's entries


def prune_gguf(
    source: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    overwrite: bool = False,
    test: Test | None = None,
    made_by: str = "",
) -> Facts:
    """Write a GGUF file without the blocks `removed`.

    Tensors `blk.N.*` of removed blocks are dropped, those above renumbered, lists with one entry a block cut, block
    counts recounted; everything else is copied byte by byte. The model's name says how many blocks are left, its label
    of size is counted anew, and `excise.original` (name of the first original's file), `excise.removed` and
    `excise.original_blocks` (by its indices) are added to the metadata. The file appears under its name only when
    whole.

    Args:
        source: a GGUF file in one part.
        removed: original indices; negative ones count from the top.
        out: file to write.
        overwrite: replace an existing file.
        test: tests what was written before it gets its name, see `excise.surgery.publish.publishing`.
        made_by: key of what makes it, for the metadata; see `excise.job.made_by`.

    Returns:
        `model_type` (llama.cpp's name), `removed`, `original_blocks`, `bytes` and `parameters` ({"before", "after"});
        and `self_test`, what the test found, if there was one.

    Raises:
        InputError: no such file, or `removed` does not fit its stack.
        ArchitectureError: llama.cpp would do something else with a block in its new place, or excise does not know.
        CheckpointError: the file is damaged, split in parts, or holds metadata of no known meaning.
        OutputError: `out` exists or is the original; or the disk is full.
        SelfTestError: the test failed.

    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if not source.is_file():
        raise InputError(f"no GGUF file {source}")
    require_free(out, folder=False, inputs=[source], force=overwrite)
    reader = open_gguf(source)
    architecture = _text(reader, gguf.Keys.General.ARCHITECTURE)
    blocks, predicting = _block_count(reader, architecture)
    removed = original_indices(removed, blocks)
    kept = kept_blocks(blocks, removed)
    _require_place_independent(reader, architecture, kept)
    new_index = {old: new for new, old in enumerate((*kept, *range(blocks, blocks + predicting)))}
    tensors = _kept_tensors(reader, new_index, blocks + predicting)
    metadata = _metadata(reader, architecture, kept, predicting)
    if removed:
        metadata = _renamed(metadata, _size_label(tensors), f"{len(kept)} of {blocks} blocks")
    step = {"original": source.name, "removed": list(removed), "original_blocks": list(kept)}
    recipe = composed(_recipe(reader), step)
    require_space(out, sum(tensor.n_bytes for _, tensor in tensors))
    with publishing(out, test) as publication:
        temporary = publication.place
        writer = _header(temporary, reader, architecture, metadata, tensors)
        if made_by:
            writer.add_string(MADE_BY_KEY, made_by)
        if recipe["removed"]:
            writer.add_string(ORIGINAL, recipe["original"])
            writer.add_array(REMOVED, recipe["removed"])
            writer.add_array(KEPT, recipe["original_blocks"])
        _write(writer, source, temporary, tensors)
    return {
        "model_type": architecture,
        "removed": recipe["removed"],
        "original_blocks": recipe["original_blocks"],
        "bytes": {"before": source.stat().st_size, "after": out.stat().st_size},
        "parameters": {
            "before": sum(int(tensor.n_elements) for tensor in reader.tensors),
            "after": sum(int(tensor.n_elements) for _, tensor in tensors),
        },
        **publication.told,
    }


def open_gguf(source: Path) -> gguf.GGUFReader:
    """Open a GGUF file in one part.

    Raises:
        CheckpointError: the file is damaged, or split in parts.

    """
    require_sound_gguf(source)
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source} is truncated or no GGUF file ({error}); download or copy it again") from error
    parts = _number(reader, gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    if parts is not None and parts > 1:
        raise CheckpointError(
            f"{source} is one of {parts} parts; join them first (llama-gguf-split --merge FIRST_PART OUT.gguf)"
        )
    return reader


def gguf_recipe(path: Path) -> Facts:
    """What a GGUF file says of its making, as `excise.surgery.recipe.read_recipe` gives it; empty for an original."""
    return _recipe(open_gguf(path))


def _recipe(reader: gguf.GGUFReader) -> Facts:
    original, removed, kept = (_value(reader, key) for key in RECIPE_KEYS)
    if not removed or not kept:
        return {}
    return {"original": original, "removed": removed, "original_blocks": kept}


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _number(reader: gguf.GGUFReader, key: str) -> int | None:
    value = _value(reader, key)
    return int(value) if isinstance(value, int) else None


def _text(reader: gguf.GGUFReader, key: str) -> str:
    value = _value(reader, key)
    if not isinstance(value, str):
        raise CheckpointError(f"the GGUF file has no {key}; download it again")
    return value


def _block_count(reader: gguf.GGUFReader, architecture: str) -> tuple[int, int]:
    """Blocks of the stack, and those above it for multi-token prediction."""
    total = _number(reader, f"{architecture}.block_count")
    predicting = _number(reader, f"{architecture}.nextn_predict_layers") or 0
    if total is None or not 0 <= predicting < total:
        raise CheckpointError(f"the GGUF file has no sound {architecture}.block_count; download it again")
    return total - predicting, predicting


def _require_place_independent(reader: gguf.GGUFReader, architecture: str, kept: Sequence[int]) -> None:
    """Refuse a removal after which a block would stand where llama.cpp treats it as of another kind."""
    if architecture not in INDEPENDENT and architecture not in LLAMA_CPP_PERIODS:
        known = ", ".join(sorted(INDEPENDENT | LLAMA_CPP_PERIODS.keys()))
        raise ArchitectureError(
            f"whether blocks of GGUF architecture '{architecture}' depend on their place in the stack is not known to "
            f"excise (known: {known}); prune the safetensors checkpoint and convert it"
        )
    for key in SHARED:
        if _number(reader, f"{architecture}.{key}"):
            raise ArchitectureError(f"{architecture}.{key}: blocks share key/value caches, so none can go alone")
    for period in _periods(reader, architecture):
        moved = [old for new, old in enumerate(kept) if ((old + 1) % period == 0) != ((new + 1) % period == 0)]
        if moved:
            raise ArchitectureError(
                f"llama.cpp takes one block in {period} of {architecture} for another kind, by its index, and after "
                f"this removal would take block {moved[0]} wrongly. Remove so that the others keep their place in "
                f"{period}, or prune the safetensors checkpoint, whose config lists the kinds"
            )


def _periods(reader: gguf.GGUFReader, architecture: str) -> set[int]:
    periods = {}
    if architecture not in PERIODS_IF_WINDOWED or _number(reader, f"{architecture}.attention.sliding_window"):
        periods[""] = (LLAMA_CPP_PERIODS | PERIODS_IF_WINDOWED).get(architecture, 1)
    for key, replaces_default in PERIOD_KEYS.items():
        if (period := _number(reader, f"{architecture}.{key}")) is not None:
            periods["" if replaces_default else key] = period
    return {period for period in periods.values() if period > 1}


def _kept_tensors(
    reader: gguf.GGUFReader, new_index: Mapping[int, int], blocks: int
) -> list[tuple[str, gguf.ReaderTensor]]:
    kept, found = [], set()
    for tensor in reader.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name)
        if match is None:
            kept.append((tensor.name, tensor))
            continue
        found.add(int(match[1]))
        if (new := new_index.get(int(match[1]))) is not None:
            kept.append((f"blk.{new}.{match[2]}", tensor))
    if found != set(range(blocks)):
        wrong = min(found ^ set(range(blocks)))
        raise CheckpointError(
            f"the GGUF file counts {blocks} blocks, but {'lacks' if wrong < blocks else 'has'} tensors of block {wrong}"
        )
    return kept


def _size_label(tensors: Sequence[tuple[str, gguf.ReaderTensor]]) -> str:
    """Parameters as GGUF writes them, such as 135M, or 8x7B for experts."""
    experts = [tensor for name, tensor in tensors if "_exps." in name]
    total = sum(int(tensor.n_elements) for _, tensor in tensors)
    shared = total - sum(int(tensor.n_elements) for tensor in experts)
    one_of_each = sum(int(tensor.n_elements) // int(tensor.shape[-1]) for tensor in experts)
    count = sum(int(tensor.shape[-1]) for tensor in experts) // max(1, len(experts))
    return gguf.size_label(total, shared, one_of_each, count)


def _renamed(metadata: Sequence[Entry], size: str, blocks: str) -> list[Entry]:
    """Let the model's name and its label of size, where the file has them, speak of what is left."""
    before = {key: value for key, value, *_ in metadata}.get(gguf.Keys.General.SIZE_LABEL)
    renamed = []
    for key, value, *types in metadata:
        if key == gguf.Keys.General.NAME:
            words = re.split(r"([\s_-]+)", value)
            value = f"{''.join(size if word == before else word for word in words)}, {blocks}"
        elif key == gguf.Keys.General.SIZE_LABEL:
            value = size
        renamed.append((key, value, *types))
    return renamed


def _metadata(reader: gguf.GGUFReader, architecture: str, kept: Sequence[int], predicting: int) -> list[Entry]:
    """Key, value, type and type of entries, of everything that the new file is to say."""
    blocks, _ = _block_count(reader, architecture)
    total = blocks + predicting
    rows = [*kept, *range(blocks, total)]
    entries = []
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (gguf.Keys.General.ARCHITECTURE, MADE_BY_KEY, *RECIPE_KEYS):
            continue
        value, key = field.contents(), field.name.removeprefix(f"{architecture}.")
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        if len(field.types) > 2:
            raise CheckpointError(f"{field.name} is a list of lists, which the gguf package does not keep apart")
        if is_list and not value:
            continue  # cannot be written, and says nothing
        if key != field.name:
            if key == "block_count":
                value = len(rows)
            elif key in POSITIONS:
                value -= sum(i < value for i in set(range(blocks)) - set(kept))
            elif is_list and key in PER_BLOCK:
                if len(value) < total:
                    raise CheckpointError(f"{field.name} has {len(value)} entries for {total} blocks")
                value = [value[i] for i in rows]
            elif is_list and len(value) in (blocks, total) and key not in NOT_PER_BLOCK:
                raise CheckpointError(
                    f"{field.name} has as many entries as the stack has blocks, and whether they belong to the blocks "
                    f"is not known to excise; prune the safetensors checkpoint and convert it"
                )
        entries.append((field.name, value, field.types[0], field.types[-1] if is_list else None))
    return entries


def _header(
    path: Path,
    reader: gguf.GGUFReader,
    architecture: str,
    metadata: Sequence[Entry],
    tensors: Sequence[tuple[str, gguf.ReaderTensor]],
) -> gguf.GGUFWriter:
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, architecture, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    for key, value, kind, entries in metadata:
        writer.add_key_value(key, value, kind, sub_type=entries)
    for name, tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    return writer


def _write(writer: gguf.GGUFWriter, source: Path, path: Path, tensors: Sequence[tuple[str, gguf.ReaderTensor]]) -> None:
    """Write the header, and let the system copy the tensors' bytes."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with source.open("rb") as original, path.open("r+b", buffering=0) as target:
        target.seek(0, 2)
        for _, tensor in tensors:
            target.write(b"\0" * (-target.tell() % writer.data_alignment))
            copy_range(original.fileno(), target.fileno(), tensor.data_offset, tensor.n_bytes, str(source))
        target.write(b"\0" * (-target.tell() % writer.data_alignment))
