"""Pruning a checkpoint from folder to folder: every byte of what stays is the original's, save of changed tensors.

Nothing is decoded, so every dtype and every quantisation passes through; memory is that of the headers, and of the
changed tensors where there are any: a repair, a merger or a training changes weights, and nothing else of a checkpoint.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from excise.artefacts import RECIPE, read_json, require_free, write_artefact, write_json
from excise.errors import ArchitectureError, CheckpointError, InputError, OutputError
from excise.models.architectures import Architecture, architecture_of
from excise.models.claims import require_honest
from excise.models.headers import Checkpoint, Tensor, read_checkpoint
from excise.models.names import Names, names_in, without_prefix
from excise.models.portable import portability
from excise.plain import Facts, Values
from excise.surgery import quantisation
from excise.surgery.card import model_card, original_metadata
from excise.surgery.changed import Changed
from excise.surgery.config import kept_blocks
from excise.surgery.publish import Test, publishing
from excise.surgery.raw_config import pruned_raw_config
from excise.surgery.recipe import composed, read_recipe
from excise.surgery.shards import write_shards
from excise.surgery.side_files import carry_along, without_absent_modules
from excise.text import human_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint folder as far as its headers and its JSON files tell.

    Attributes:
        folder: where it lies.
        raw: config.json as it stands there.
        config: the same as transformers reads it.
        architecture: the record of its model type.
        checkpoint: its tensors.

    """

    folder: Path
    raw: Facts
    config: PretrainedConfig
    architecture: Architecture
    checkpoint: Checkpoint

    @property
    def blocks(self) -> int:
        """Blocks that the config counts."""
        return self.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def quantised(self) -> bool:
        """Whether settings beside the tensors say what their bytes mean."""
        settings = any(self.raw.get(key) for key in quantisation.CONFIG_KEYS)
        return settings or any((self.folder / name).exists() for name in quantisation.FILES)

    @cached_property
    def names(self) -> Names | None:
        """How transformers reads the tensors' names; None where it has no such model."""
        return names_in(self.config)

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """Names under which the blocks' tensors stand, each followed by `.index.`."""
        names, stack = [tensor.name for tensor in self.checkpoint.tensors], self.architecture.stack
        if self.names is not None:
            return self.names.block_prefixes(names, self.architecture)
        return tuple(p for p in (stack, without_prefix(stack)) if any(_place(name, [p]) for name in names))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pruned checkpoint is to be.

    Attributes:
        removed: sorted original indices.
        tensors: name in the original → what to write, in the order in which they lie there.
        config: the new config.json.
        new_index: original index of a block → new one, or None.
        left_out: pattern of tensors that are not written, though they belong to no block → why.

    """

    removed: tuple[int, ...]
    tensors: Mapping[str, Tensor | Changed]
    config: Facts
    new_index: Mapping[int, int | None]
    left_out: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def prune_folder(
    source: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    changed: Mapping[str, Changed] | None = None,
    card: Values | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    test: Test | None = None,
) -> Facts:
    """Write a checkpoint folder without the blocks `removed`, from folder to folder.

    Tensors of removed blocks are dropped and those above renumbered; every other byte is copied as it is, but for
    tensors that changed in memory. The config and the lists of modules in quantisation settings follow; tokenizer, chat
    template, generation config and Python files are carried along and never run. What predicts several tokens from the
    whole stack's output (blocks above it, `mtp.*`) is dropped, as the loader drops it. The folder appears under its
    name only when whole.

    Args:
        source: a checkpoint folder with safetensors weights.
        removed: original indices; negative ones count from the top.
        out: folder to write.
        changed: tensors to take from memory, by their names in the original; see
            `excise.surgery.changed.changed_tensors`.
        card: facts for the model card and the recipe, see `excise.surgery.card.model_card`.
        max_shard_size: upper size of one weights file, such as "5GB", or in bytes.
        overwrite: replace an existing checkpoint folder.
        test: tests what was written before it gets its name, see `excise.surgery.publish.publishing`.

    Returns:
        The recipe, as in excise.json (see `excise.surgery.recipe`): the facts of `card` and, among others, `removed`,
        `original_blocks`, `readers` (see `excise.models.portable.Portability`) and `bytes` ({"before", "after"}, of all
        tensors); where the weights are not quantised, `parameters` and `dtype`, too; and `left_out` ({file or tensors:
        why}), if anything was. Beside it `self_test`, what the test found, if there was one.

    Raises:
        InputError: no such checkpoint, or `removed` does not fit the stack, or would leave no block.
        ArchitectureError: the model type is unknown, or its blocks depend on their place in the stack.
        CheckpointError: the checkpoint is damaged, unsafe, or out of step with its config.
        OutputError: the folder exists, is not a checkpoint, or is the original's own; or the disk is full.
        SelfTestError: the test failed.

    """
    out = Path(out).expanduser()
    require_free(out, folder=True, inputs=[source], force=overwrite)
    original = read_source(source)
    plan = plan_removal(original, removed, changed)
    require_space(out, plan.bytes)
    with publishing(out, test) as publication:
        folder = publication.place
        folder.mkdir()
        write_shards(plan.tensors.values(), original.checkpoint.metadata or {"format": "pt"}, folder, max_shard_size)
        left_out = {**plan.left_out, **carry_along(original.folder, folder)}
        _renumber_settings(folder, original, plan.new_index)
        step = {
            **(card or {}),
            "original": (card or {}).get("original") or str(source),
            "model_type": original.config.model_type,
            "removed": list(plan.removed),
            "original_blocks": list(kept_blocks(original.blocks, plan.removed)),
            "readers": portability(original.architecture, original.config, plan.removed, original.raw).describe(),
            **_sizes(original, plan),
            **({"left_out": left_out} if left_out else {}),
        }
        recipe = composed(read_recipe(original.folder), step)
        _write_config(folder, plan.config)
        write_artefact(folder / RECIPE, recipe)
        text = model_card(recipe, name=out.name, original=original_metadata(original.folder))
        (folder / "README.md").write_text(text, encoding="utf-8")
    return recipe | publication.told


def write_dequantised(source: Source, removed: Sequence[int], folder: Path, dtype: str) -> Facts:
    """Put config and files of a quantised original beside plain weights of its model, which lie in `folder`.

    Args:
        source: the original.
        removed: sorted original indices.
        folder: where transformers saved the pruned model; its config and other files are replaced.
        dtype: of the weights.

    Returns:
        What was left out, for the recipe.

    """
    config = pruned_raw_config(source.raw, source.config, source.architecture, removed)
    config = {key: value for key, value in config.items() if key not in quantisation.CONFIG_KEYS}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    left_out = carry_along(source.folder, folder)
    for path in (folder / name for name in quantisation.FILES):
        path.unlink(missing_ok=True)
    _write_config(folder, config)
    return {"left_out": left_out} if left_out else {}


def _write_config(folder: Path, config: Facts) -> None:
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    write_json(folder / "config.json", without_absent_modules(config, present))


def read_source(folder: str | Path) -> Source:
    """Read config and headers of a checkpoint folder; code beside them is not run.

    Raises:
        InputError: no such checkpoint.
        ArchitectureError: the model type is unknown, or its blocks depend on their place in the stack.
        CheckpointError: config or weights are damaged or unsafe, or an adapter lies beside the weights.

    """
    from transformers import AutoConfig

    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"folder {folder} has no config.json; expected a transformers checkpoint")
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no JSON object; download it again")
    architecture_of(str(raw.get("model_type")))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of fields that do not fit it
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"transformers cannot read {folder / 'config.json'}: {reason}") from error
    architecture = architecture_of(config.model_type)
    for key, wanted in architecture.required.items():
        if getattr(config, key, wanted) != wanted:
            raise ArchitectureError(
                f"this {config.model_type} has {key}={getattr(config, key)!r}, so its blocks depend on their place in "
                f"the stack; only {key}={wanted!r} is supported"
            )
    checkpoint = read_checkpoint(folder)
    require_honest(config, checkpoint, folder)
    return Source(folder, raw, config, architecture, checkpoint)


def plan_removal(source: Source, removed: Sequence[int], changed: Mapping[str, Changed] | None = None) -> Plan:
    """Say what the checkpoint without the blocks `removed` is to be; nothing is written.

    Args:
        source: the original.
        removed: original indices; negative ones count from the top.
        changed: tensors to take from memory.

    Raises:
        InputError: `removed` does not fit the stack, or would leave no block.
        ArchitectureError: no config describes what is left.
        CheckpointError: config and weights do not belong together, or a tensor cannot be cut.

    """
    removed = original_indices(removed, source.blocks)
    new_index = _new_indices(source, removed)
    config = pruned_raw_config(source.raw, source.config, source.architecture, removed)
    for key in (key for key in quantisation.CONFIG_KEYS if source.raw.get(key)):
        config[key] = quantisation.renumbered(source.raw[key], _spellings(source), new_index)
    tensors, left_out = _kept_tensors(source, new_index, changed or {})
    return Plan(removed, tensors, config, new_index, left_out)


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


def _new_indices(source: Source, removed: Sequence[int]) -> dict[int, int | None]:
    """Original index → new one, or None; checked against the blocks that the tensors speak of."""
    blocks, raw = source.blocks, source.raw
    found = {place[1] for t in source.checkpoint.tensors if (place := _place(t.name, source.prefixes))}
    where = " or ".join(_spellings(source))
    absent = sorted(set(range(blocks)) - found)
    if absent:
        raise CheckpointError(
            f"the config counts {blocks} blocks, but there are no tensors of block {absent[0]} under {where}; "
            f"config and weights do not belong together"
        )
    text = raw.get("text_config") or raw
    counts = [text.get(key) for key in source.architecture.extra_blocks]
    predicting = sum(count for count in counts if isinstance(count, int))
    above = sorted(found - set(range(blocks)))
    if above and above != list(range(blocks, blocks + predicting)):
        raise CheckpointError(
            f"the config counts {blocks} blocks, but there are tensors of block {above[-1]} under "
            f"{where}; config and weights do not belong together"
        )
    gone = {*removed, *above}
    return {i: None if i in gone else i - sum(r < i for r in removed) for i in (*range(blocks), *above)}


def _place(name: str, prefixes: Sequence[str]) -> tuple[str, int, str] | None:
    """Split a tensor's name into prefix, index of its block and rest; None for a tensor outside the stack."""
    for prefix in prefixes:
        if match := re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.(.+)", name):
            return prefix, int(match[1]), match[2]
    return None


def _spellings(source: Source) -> tuple[str, ...]:
    """Names that settings may use for the block list: those of the file and that of the model."""
    return tuple(dict.fromkeys((*source.prefixes, source.architecture.stack)))


def _kept_tensors(
    source: Source, new_index: Mapping[int, int | None], changed: Mapping[str, Changed]
) -> tuple[dict[str, Tensor | Changed], dict[str, str]]:
    """What is to be written, under its new names; of tensors with a slice a block, the kept blocks' slices."""
    kept: dict[str, Tensor | Changed] = {}
    left_out: dict[str, str] = {}
    kept_indices = [old for old, new in new_index.items() if new is not None]
    sliced = {
        f"{prefix.rpartition('.')[0]}.{path}".removeprefix("."): dimension
        for prefix in source.prefixes
        for path, dimension in source.architecture.sliced
    }
    for stored in source.checkpoint.tensors:
        tensor = changed.get(stored.name, stored)
        if (place := _place(stored.name, source.prefixes)) is not None:
            if (new := new_index[place[1]]) is not None:
                kept[stored.name] = tensor.renamed(f"{place[0]}.{new}.{place[2]}")
        elif stored.name in sliced:
            if stored.dtype not in DTYPES:
                raise CheckpointError(
                    f"{stored.name} has a slice for each block and is quantised ({stored.dtype}); it can only be cut "
                    f"where its weights are plain. Prune the original in bfloat16, and quantise that"
                )
            kept[stored.name] = tensor.sliced(sliced[stored.name], source.blocks, kept_indices)
        elif source.names is not None and source.names.is_dropped(stored.name):
            left_out[f"{stored.name.partition('.')[0]}.*"] = "transformers does not load it"
        else:
            kept[stored.name] = tensor
    return kept, left_out


def _sizes(source: Source, plan: Plan) -> Facts:
    """Bytes before and after, and elements where they are parameters: scales and packed weights are none."""
    tensors = source.checkpoint.tensors
    sizes: Facts = {"bytes": {"before": source.checkpoint.bytes, "after": plan.bytes}}
    if not source.quantised:
        sizes["parameters"] = {
            "before": _parameters(source, ((tensor.name, tensor.elements) for tensor in tensors)),
            "after": _parameters(source, ((name, tensor.elements) for name, tensor in plan.tensors.items())),
        }
        sizes["dtype"] = ", ".join(sorted({DTYPES.get(tensor.dtype, tensor.dtype) for tensor in plan.tensors.values()}))
    return sizes


def _parameters(source: Source, sizes: Iterable[tuple[str, int]]) -> int:
    """Elements of parameters: what the loader drops is none, and of tied tensors that are both stored one counts."""
    total, seen = 0, set()
    for name, elements in sizes:
        parameter = source.names.parameter(name) if source.names else name
        if parameter is None or parameter in seen:
            continue
        if not (source.names and source.names.is_converted(name)):  # the parts of a fused parameter all count
            seen.add(parameter)
        total += elements
    return total


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
            f"{out} needs {human_bytes(needed)}, and {human_bytes(free)} are free there; free some space or choose "
            f"another place with --out"
        )


def _renumber_settings(folder: Path, source: Source, new_index: Mapping[int, int | None]) -> None:
    for path in (folder / name for name in quantisation.FILES):
        if path.is_file():
            write_json(path, quantisation.renumbered(read_json(path), _spellings(source), new_index))
