"""Pruning a checkpoint from folder to folder: no model in memory, the bytes of what stays untouched.

Nothing is decoded, so every dtype and every quantisation passes through; memory is that of the headers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excise.artefacts import atomic_path, read_json, write_json
from excise.errors import ArchitectureError, CheckpointError, InputError, OutputError
from excise.models.architectures import Architecture, architecture_of
from excise.models.headers import Checkpoint, Tensor, read_checkpoint
from excise.surgery import quantisation
from excise.surgery.card import model_card
from excise.surgery.config import kept_blocks
from excise.surgery.destination import RECIPE, check_destination
from excise.surgery.raw_config import pruned_raw_config
from excise.surgery.shards import write_shards

# What a checkpoint folder may hold besides: other copies of the original's weights, and what is written anew.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
WRITTEN_ANEW = {"config.json", "README.md", RECIPE}
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CARRIED_FOLDERS = ("additional_chat_templates",)


def prune_folder(
    source: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint folder without the blocks `removed`, from folder to folder.

    Tensors of removed blocks are dropped and those above renumbered; every other byte is copied as it is. The config
    and the lists of modules in quantisation settings follow; tokenizer, chat template, generation config and Python
    files are carried along and never run. Blocks above the stack, which some checkpoints keep for multi-token
    prediction, are dropped. The folder appears under its name only when whole.

    Args:
        source: a checkpoint folder with safetensors weights.
        removed: original indices; negative ones count from the top.
        out: folder to write.
        card: facts for the model card and the recipe, see `excise.surgery.card.model_card`.
        max_shard_size: upper size of one weights file, such as "5GB", or in bytes.
        overwrite: replace an existing checkpoint folder.

    Returns:
        The recipe, as in excise.json: the facts of `card` and, among others, `removed`, `original_blocks` and `bytes`
        ({"before", "after"}, of all tensors); where the weights are not quantised, `parameters`, too.

    Raises:
        InputError: no such checkpoint, or `removed` does not fit the stack, or would leave no block.
        ArchitectureError: the model type is unknown, or its blocks depend on their place in the stack.
        CheckpointError: the checkpoint is damaged, unsafe, or out of step with its config.
        OutputError: the folder exists, is not a checkpoint, or is the original's own; or the disk is full.

    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    check_destination(out, source, overwrite)
    raw, config, architecture = _read_config(source)
    blocks = config.get_text_config(decoder=True).num_hidden_layers
    removed = original_indices(removed, blocks)
    checkpoint = read_checkpoint(source)
    new_index = _new_indices(checkpoint, raw, architecture, blocks, removed)
    kept = _kept_tensors(checkpoint, architecture, new_index, blocks)
    require_space(out, sum(tensor.bytes for tensor in kept))
    new_config = pruned_raw_config(raw, config, architecture, removed)
    settings = [key for key in quantisation.CONFIG_KEYS if raw.get(key)]
    for key in settings:
        new_config[key] = quantisation.renumbered(raw[key], architecture.tensor_prefixes, new_index)
    recipe = {
        **(card or {}),
        "original": (card or {}).get("original") or str(source),
        "model_type": config.model_type,
        "removed": list(removed),
        "original_blocks": list(kept_blocks(blocks, removed)),
        **_sizes(
            checkpoint, kept, quantised=bool(settings) or any((source / name).exists() for name in quantisation.FILES)
        ),
    }
    with atomic_path(out) as folder:
        folder.mkdir()
        write_shards(kept, checkpoint.metadata or {"format": "pt"}, folder, max_shard_size)
        _carry_along(source, folder, architecture, new_index)
        write_json(folder / "config.json", new_config)
        write_json(folder / RECIPE, recipe)
        (folder / "README.md").write_text(model_card(recipe, name=out.name), encoding="utf-8")
    return recipe


def original_indices(removed: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Return `removed` sorted; negative indices count from the top of a stack of `blocks` blocks.

    Raises:
        InputError: an index is outside the stack or given twice, or no block would be left.

    """
    if any(not -blocks <= i < blocks for i in removed):
        raise InputError(
            f"removed blocks must be between 0 and {blocks - 1} (or negative, from the top), got {list(removed)}"
        )
    indices = sorted(i % blocks for i in removed)
    kept_blocks(blocks, indices)
    return tuple(indices)


def _read_config(source: Path) -> tuple[dict[str, Any], Any, Architecture]:
    """The config as it stands in the file and as transformers reads it; code beside it is not run."""
    from transformers import AutoConfig

    if not (source / "config.json").is_file():
        raise InputError(f"folder {source} has no config.json; expected a transformers checkpoint")
    raw = read_json(source / "config.json")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source / 'config.json'} is no JSON object; download it again")
    architecture_of(str(raw.get("model_type")))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of fields that do not fit it
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"transformers cannot read {source / 'config.json'}: {reason}") from error
    architecture = architecture_of(config.model_type)
    for key, wanted in architecture.required.items():
        if getattr(config, key, wanted) != wanted:
            raise ArchitectureError(
                f"this {config.model_type} has {key}={getattr(config, key)!r}, so its blocks depend on their place in "
                f"the stack; only {key}={wanted!r} is supported"
            )
    return raw, config, architecture


def _new_indices(
    checkpoint: Checkpoint, raw: Mapping[str, Any], architecture: Architecture, blocks: int, removed: Sequence[int]
) -> dict[int, int | None]:
    """Original index → new one, or None; checked against the blocks that the tensors speak of."""
    found = {place[1] for t in checkpoint.tensors if (place := _place(t.name, architecture.tensor_prefixes))}
    absent = sorted(set(range(blocks)) - found)
    if absent:
        raise CheckpointError(
            f"the config counts {blocks} blocks, but there are no tensors of block {absent[0]} under "
            f"{' or '.join(architecture.tensor_prefixes)}; config and weights do not belong together"
        )
    text = raw.get("text_config") or raw
    counts = [text.get(key) for key in architecture.extra_blocks]
    predicting = sum(count for count in counts if isinstance(count, int))
    above = sorted(found - set(range(blocks)))
    if above and above != list(range(blocks, blocks + predicting)):
        raise CheckpointError(
            f"the config counts {blocks} blocks, but there are tensors of block {above[-1]} under "
            f"{' or '.join(architecture.tensor_prefixes)}; config and weights do not belong together"
        )
    gone = {*removed, *above}
    return {i: None if i in gone else i - sum(r < i for r in removed) for i in (*range(blocks), *above)}


def _place(name: str, prefixes: Sequence[str]) -> tuple[str, int, str] | None:
    """Split a tensor's name into prefix, index of its block and rest; None for a tensor outside the stack."""
    for prefix in prefixes:
        if match := re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.(.+)", name):
            return prefix, int(match[1]), match[2]
    return None


def _kept_tensors(
    checkpoint: Checkpoint, architecture: Architecture, new_index: Mapping[int, int | None], blocks: int
) -> list[Tensor]:
    """What is to be written, under its new names; of tensors with a slice a block, the kept blocks' slices."""
    kept = []
    kept_indices = [old for old, new in new_index.items() if new is not None]
    sliced = {
        f"{prefix.rpartition('.')[0]}.{path}".removeprefix("."): dimension
        for prefix in architecture.tensor_prefixes
        for path, dimension in architecture.sliced
    }
    for tensor in checkpoint.tensors:
        place = _place(tensor.name, architecture.tensor_prefixes)
        if place is not None:
            if (new := new_index[place[1]]) is not None:
                kept.append(tensor.renamed(f"{place[0]}.{new}.{place[2]}"))
        elif tensor.name in sliced:
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{tensor.name} has a slice for each block and is quantised ({tensor.dtype}); it can only be cut "
                    f"where its weights are plain. Prune the original in bfloat16, and quantise that"
                )
            kept.append(tensor.sliced(sliced[tensor.name], blocks, kept_indices))
        else:
            kept.append(tensor)
    return kept


def _sizes(checkpoint: Checkpoint, kept: Sequence[Tensor], quantised: bool) -> dict[str, Any]:
    """Bytes before and after, and elements where they are parameters: scales and packed weights are none."""
    sizes: dict[str, Any] = {"bytes": {"before": checkpoint.bytes, "after": sum(tensor.bytes for tensor in kept)}}
    if not quantised:
        sizes["parameters"] = {
            "before": sum(tensor.elements for tensor in checkpoint.tensors),
            "after": sum(tensor.elements for tensor in kept),
        }
        sizes["dtype"] = ", ".join(sorted({DTYPES.get(tensor.dtype, tensor.dtype) for tensor in kept}))
    return sizes


def require_space(out: Path, needed: int) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        OutputError: fewer than `needed` bytes are free where `out` is to be.

    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"{out} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; free some space or choose "
            f"another place with --out"
        )


def _carry_along(source: Path, folder: Path, architecture: Architecture, new_index: Mapping[int, int | None]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            is_weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
            if not is_weights and path.name not in WRITTEN_ANEW:
                shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name in CARRIED_FOLDERS:
            shutil.copytree(path, folder / path.name)
    for name in quantisation.FILES:
        if (folder / name).is_file():
            settings = quantisation.renumbered(read_json(folder / name), architecture.tensor_prefixes, new_index)
            write_json(folder / name, settings)
