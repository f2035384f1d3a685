"""The pruned model: for a while, in memory, on the original's own weights; and for good, as a checkpoint on disk."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from excise.artefacts import RECIPE, require_free, write_artefact
from excise.errors import ArchitectureError, CheckpointError, OutputError
from excise.models.architectures import Architecture
from excise.models.identity import unchanged
from excise.models.portable import portability
from excise.models.stack import Stack, block_indices, submodule
from excise.models.stored import format_of
from excise.plain import Facts, Plain, Values
from excise.surgery.both_versions import write_for_both
from excise.surgery.card import model_card, original_metadata
from excise.surgery.changed import changed_tensors
from excise.surgery.config import kept_blocks, pruned_config, quantisation, recounted, write_derived
from excise.surgery.on_disk import Source, prune_folder, read_source, write_dequantised
from excise.surgery.publish import Test, publishing
from excise.surgery.recipe import composed, read_recipe
from excise.surgery.sublayers import Removal, as_removal, zeroed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX_NAMES = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx")


@contextlib.contextmanager
def pruned(stack: Stack, removed: Sequence[int]) -> Iterator[Any]:
    """Context in which the model itself lacks the blocks `removed`: same object, same weights, no copy.

    The block list, the config and the index that each kept block knows itself by (its slot in the KV cache) are
    replaced, and all are put back at the end, also after an error. Inside, the model is an ordinary transformers model:
    it generates with a KV cache and can be saved. `stack` itself still speaks of the original; do not use it inside.

    Args:
        stack: the original.
        removed: original indices; negative ones count from the top.

    Yields:
        The model.

    Raises:
        InputError: `removed` does not fit the stack.
        ArchitectureError: the model or its config does not fit its architecture's record.

    """
    removed = block_indices(stack, removed)
    model, record, text_config = stack.model, stack.architecture, stack.config
    if text_config.num_hidden_layers != len(stack.blocks):
        raise ArchitectureError(
            f"the config counts {text_config.num_hidden_layers} blocks, the model has {len(stack.blocks)}; "
            f"load the model again from its checkpoint"
        )
    config = pruned_config(text_config, record, removed)
    kept = kept_blocks(len(stack.blocks), removed)
    parent_path, _, name = record.stack.rpartition(".")
    parent = model.get_submodule(parent_path)
    with contextlib.ExitStack() as undo:
        _set_attribute(undo, parent, name, nn.ModuleList(stack.blocks[i].module for i in kept))
        for position, i in enumerate(kept):
            _renumber(undo, stack.blocks[i].module, i, position, record)
        for attribute in record.position_attributes:
            _set_attribute(undo, parent, attribute, recounted(getattr(parent, attribute), removed))
        for path, dimension in record.sliced:
            _cut(undo, parent, path, dimension, kept, len(stack.blocks))
        _restore_contents(undo, model.config)  # saving writes into it
        _restore_contents(undo, text_config)
        vars(text_config).clear()
        vars(text_config).update(vars(config))
        yield model


def _renumber(undo: contextlib.ExitStack, block: nn.Module, index: int, position: int, record: Architecture) -> None:
    """Set the attributes of a block that hold its index; none of those that look like one may be left out."""
    for path in record.index_attributes:
        owner_path, _, attribute = path.rpartition(".")
        owner = submodule(block, owner_path) if owner_path else block
        if owner is not None and hasattr(owner, attribute):  # a hybrid's blocks differ in what they have
            _set_attribute(undo, owner, attribute, position)
    for name, module in block.named_modules():
        for attribute in INDEX_NAMES:
            if vars(module).get(attribute, position) not in (position, None):
                raise ArchitectureError(
                    f"{type(block).__name__} (block {index}) holds its index in {name or 'itself'} as '{attribute}', "
                    f"which its record in excise.models.architectures does not name"
                )


def _cut(
    undo: contextlib.ExitStack, parent: nn.Module, path: str, dimension: int, kept: Sequence[int], blocks: int
) -> None:
    """Keep the kept blocks' slices of a parameter that holds one for each block; a model may be without it."""
    owner_path, _, name = path.rpartition(".")
    owner = submodule(parent, owner_path)
    if owner is None:
        return
    parameter = getattr(owner, name)
    slices = parameter.data.chunk(blocks, dim=dimension)
    cut = nn.Parameter(torch.cat([slices[i] for i in kept], dim=dimension), parameter.requires_grad)
    _set_attribute(undo, owner, name, cut)


def _set_attribute(undo: contextlib.ExitStack, owner: Any, name: str, value: Plain) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _restore_contents(undo: contextlib.ExitStack, config: PretrainedConfig) -> None:
    """Let a config be changed from within: the base model and every attention hold the same object."""
    original = dict(vars(config))

    def restore() -> None:
        vars(config).clear()
        vars(config).update(original)

    undo.callback(restore)


def write_pruned(
    stack: Stack,
    removed: Sequence[int],
    out: str | Path,
    *,
    source: str | Path | None = None,
    sublayers: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase = None,
    dtype: torch.dtype | None = None,
    card: Values | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    requantise: bool = False,
    test: Test | None = None,
) -> Facts:
    """Write the model without the blocks `removed` as a checkpoint folder that stock transformers loads.

    With a `source` it is that folder's checkpoint without these blocks: its config, tokenizer and other files, its
    tensors' names, layout and dtypes; only tensors that changed in memory differ (see
    `excise.surgery.on_disk.prune_folder`). Where the source is quantised, weights in plain `dtype` replace all, and
    quantisation settings go, unless `requantise` is asked for. Without a source (a GGUF file, a model
    made in memory) transformers saves it, in the spelling that its version 4.57 reads, too.

    The folder also holds a model card (README.md) and the recipe as data (excise.json). It appears under its name only
    when whole.

    Args:
        stack: the original model.
        removed: original indices; negative ones count from the top.
        out: folder to write.
        source: the checkpoint folder that the model was loaded from, `Loaded.folder`.
        sublayers: gates of sublayers to remove by themselves: their weights that write to the residual stream become 0,
            which is exact, and neither smaller nor faster. A block that loses all of its sublayers is removed.
        tokenizer: carried along where there is no source to carry files from.
        dtype: floating dtype of the weights on disk where no source says; None keeps that of the loaded model. Weights
            are cast in place and back, so no second copy is held, save of those tensors that the cast would round.
        card: facts for the model card and the recipe, see `excise.surgery.card.model_card`.
        max_shard_size: upper size of one weights file, such as "5GB", or in bytes.
        overwrite: replace an existing checkpoint folder.
        requantise: let a float8 source stay as it is, but for matrices that changed, which are quantised anew; meant
            for changes that were fitted as they are rounded so (`excise.models.stored.Stored`).
        test: tests what was written before it gets its name, see `excise.surgery.publish.publishing`.

    Returns:
        The recipe, as in excise.json (see `excise.surgery.recipe`):
        the facts of `card` and, among others, `removed`, `original_blocks` (for each
        block of the pruned model, its index in the original) and, if there are any, `zeroed_sublayers` (by name).
        Beside it `self_test`, what the test found, if there was one.

    Raises:
        InputError: `removed` or `sublayers` does not fit the stack, or no block would be left.
        ArchitectureError: other blocks depend on a removed one, no config describes what is left, or a sublayer cannot
            go without its block.
        OutputError: the folder exists, is not a checkpoint, or is the original's own; or the disk is full.
        CheckpointError: the weights are quantised or offloaded in a way that cannot be saved, or do not fit the source.
        SelfTestError: the test failed.

    """
    removal = as_removal(stack, removed, sublayers)
    out = Path(out).expanduser()
    require_free(out, folder=True, inputs=[source or stack.model.config.name_or_path], force=overwrite)
    require_plain(stack.model)
    facts = dict(card or {})
    if removal.zeroed:
        facts["zeroed_sublayers"] = [stack.sublayers[gate].name for gate in removal.zeroed]
    original = None if source is None else read_source(source)
    form = format_of(original.folder) if original and original.quantised and requantise else None
    if original is None or (original.quantised and form is None):
        return _write_from_memory(stack, removal, out, original, tokenizer, dtype, facts, max_shard_size, test)
    with zeroed(stack, removal.zeroed):  # not while testing: the reference must share nothing with what was written
        changed = changed_tensors(stack.model, original.checkpoint, form)
    return prune_folder(
        original.folder,
        removal.blocks,
        out,
        changed=changed,
        card=facts,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        test=test,
    )


def _write_from_memory(
    stack: Stack,
    removal: Removal,
    out: Path,
    original: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
    facts: Facts,
    max_shard_size: str | int,
    test: Test | None,
) -> Facts:
    with _no_space_as_output_error(out), publishing(out, test) as publication:
        folder = publication.place
        folder.mkdir()
        before, removed = _parameter_count(stack.model), removal.blocks
        readers = portability(stack.architecture, stack.model.config, removed, original.raw if original else None)
        with (
            zeroed(stack, removal.zeroed),
            _without_gguf_marks(stack.model),
            _in_released_layout(stack.model),
            pruned(stack, removed) as model,
            unchanged(model),  # a cast to the checkpoint's dtype and back moves the weights
            _stored_as(model, dtype),
        ):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            write_derived(folder, model.config, stack.architecture)
            step = {
                **facts,
                "original": facts.get("original") or model.config.name_or_path or None,
                "model_type": model.config.model_type,
                "removed": list(removed),
                "original_blocks": list(kept_blocks(len(stack.blocks), removed)),
                "readers": readers.describe(),
                "parameters": {"before": before, "after": _parameter_count(model)},
                "dtype": str(model.dtype).removeprefix("torch."),
            }
        if original is None:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_for_both(folder)
        else:
            step |= write_dequantised(original, removed, folder, step["dtype"])
        origin = original.folder if original else step["original"] or ""
        recipe = composed(read_recipe(origin), step)
        write_artefact(folder / RECIPE, recipe)
        metadata = original_metadata(origin)
        (folder / "README.md").write_text(model_card(recipe, name=out.name, original=metadata), encoding="utf-8")
    return recipe | publication.told


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def require_plain(model: PreTrainedModel) -> None:
    """Refuse a model whose weights in memory are no plain numbers, so that changed ones could not be written.

    Raises:
        CheckpointError: they are quantised or packed.

    """
    method = quantisation(model.config)
    if method is not None and method != "gguf":
        raise CheckpointError(
            f"the weights are quantised ({method}), and pruning in memory writes plain weights only; "
            f"load the model dequantised, or the original in bfloat16"
        )
    if getattr(getattr(model, "hf_quantizer", None), "packed_modules", None):
        raise CheckpointError("the weights are still packed in GGUF blocks; load them with GgufConfig(dequantize=True)")


@contextlib.contextmanager
def _no_space_as_output_error(out: Path) -> Iterator[None]:
    """Translate what safetensors raises, which hides the errno in its text; plain OSErrors are atomic_path's."""
    try:
        yield
    except SafetensorError as error:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if any(f"os error {code}" in str(error) for code in codes) or "No space left" in str(error):
            raise OutputError(
                f"no space left to write {out} ({error}); nothing was left there. Free some space and run again"
            ) from error
        raise


@contextlib.contextmanager
def _without_gguf_marks(model: PreTrainedModel) -> Iterator[None]:
    """Let a model read from a GGUF file be saved; its weights are ordinary tensors, only marked as quantised."""
    names = ("hf_quantizer", "quantization_method", "is_quantized")
    marks = {name: vars(model).pop(name) for name in names if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(marks)


@contextlib.contextmanager
def _in_released_layout(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers save experts one by one, as they are released, however this model was loaded.

    It takes back what it did when loading, and from a GGUF file it did something else.
    """
    conversions = vars(model).pop("_weight_conversions", None)
    try:
        yield
    finally:
        if conversions is not None:
            model._weight_conversions = conversions


@contextlib.contextmanager
def _stored_as(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Context in which the model's floating parameters have `dtype`, save those transformers itself keeps in float32.

    A model computed in float32 but stored in bfloat16 goes there and back without loss, so the cast replaces each
    tensor; where it would round, the original tensor is held for the way back.
    """
    if dtype is None:
        yield
        return
    in_float32 = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    undo: list[tuple[nn.Parameter, torch.Tensor | torch.dtype]] = []
    try:
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.dtype == dtype or any(k in name for k in in_float32):
                continue
            if parameter.is_meta:
                raise CheckpointError(
                    f"{name} is offloaded, so its dtype cannot change while saving; load the model in "
                    f"{str(dtype).removeprefix('torch.')}, or where it fits in memory"
                )
            original, cast = parameter.data, parameter.data.to(dtype)
            if original.isfinite().all() and not cast.isfinite().all():
                raise CheckpointError(f"{name} exceeds the range of {dtype}; write it in bfloat16 or float32")
            lossless = torch.equal(cast.to(original.dtype), original)
            undo.append((parameter, original.dtype if lossless else original))
            parameter.data = cast
            del original
        yield
    finally:
        for parameter, way_back in undo:
            parameter.data = way_back if isinstance(way_back, torch.Tensor) else parameter.data.to(way_back)
