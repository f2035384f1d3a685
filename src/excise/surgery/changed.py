"""What a model in memory says otherwise than its checkpoint: tensors to write anew, in the checkpoint's own form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from excise.errors import CheckpointError
from excise.models import headers
from excise.models.headers import Checkpoint
from excise.models.loading import PLAIN
from excise.models.names import Names, without_prefix
from excise.models.quantised import Format
from excise.models.residency import replacements
from excise.models.stored import FLOAT8_DTYPES, float8_of
from excise.plain import Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
DTYPES = {**PLAIN, **FLOAT8_DTYPES, **SCALES}


@dataclass(frozen=True, eq=False)
class Changed:
    """A tensor to write from memory, as `excise.models.headers.Tensor` is one to copy.

    Attributes:
        name: under which it is written.
        dtype: as headers spell it; the content is cast to it when written.
        content: [shape].

    """

    name: str
    dtype: str
    content: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As the header is to say it."""
        return tuple(self.content.shape)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Their number as written."""
        return self.elements * headers.BITS[self.dtype] // 8

    def renamed(self, name: str) -> Changed:
        """Return the same content under another name."""
        return replace(self, name=name)

    def sliced(self, dimension: int, total: int, kept: Sequence[int]) -> Changed:
        """Return the part made of the slices `kept`, of `total` equal ones along a dimension."""
        slices = self.content.chunk(total, dim=dimension)
        return replace(self, content=torch.cat([slices[i] for i in kept], dim=dimension))

    def to_bytes(self) -> Any:
        """Return the content as it is to lie in the file.

        Raises:
            CheckpointError: a finite number is beyond the dtype's range.

        """
        original = self.content.detach()
        cast = original.to("cpu", DTYPES[self.dtype]).contiguous()
        if self.dtype in PLAIN and original.isfinite().all() and not cast.isfinite().all():
            raise CheckpointError(
                f"{self.name} exceeds the range of {self.dtype}, in which the original stores it; convert the original "
                f"to bfloat16 or float32 first"
            )
        return cast.reshape(-1).view(torch.uint8).numpy().data


def changed_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, form: Format | None = None
) -> Mapping[str, Changed]:
    """Find what a loaded model's weights say otherwise than the checkpoint they came from.

    Every tensor of the checkpoint is read once and compared in the model's dtype, so that what was only cast on the way
    into memory counts as the same. Where the loader fuses or transposes tensors, its own reversal is asked for. A
    float8 matrix that changed is quantised anew, with scales in the layout that it had.

    Args:
        model: the whole model, with all of its blocks.
        checkpoint: of plain tensors, and float8 ones with their scales.
        form: how the latter are stored, if there are any.

    Returns:
        Name in the checkpoint → the new tensor, in the dtype, shape and layout of the old one.

    Raises:
        CheckpointError: a weight of the model has no place in the checkpoint, or another shape there.

    """
    names, weights = Names(model), {**model.state_dict(), **replacements(model)}
    read = {tensor.name: key for tensor in checkpoint.tensors if (key := names.key(tensor.name)) is not None}
    _require_place(names, weights, read)
    fused = {name for name in read if names.is_converted(name)}
    separate = revert_weight_conversion(model, dict(weights)) if fused else {}
    changed: dict[str, Changed] = {}
    for name, matrix in (float8_of(checkpoint, form) if form else {}).items():
        if name in read:
            content = _separate(separate, name, model) if name in fused else weights[read[name]]
            if not content.is_meta and _differs(matrix.values, matrix.read, content):
                pair = zip((matrix.values, matrix.scale), matrix.quantised(content.detach()), strict=True)
                changed |= {tensor.name: Changed(tensor.name, tensor.dtype, new) for tensor, new in pair}
    for shard in dict.fromkeys(tensor.shard for tensor in checkpoint.tensors):
        with safe_open(shard, framework="pt") as file:
            for tensor in checkpoint.tensors:
                if tensor.shard != shard or tensor.name not in read or tensor.dtype not in PLAIN:
                    continue
                key = read[tensor.name]
                content = _separate(separate, tensor.name, model) if tensor.name in fused else weights[key]
                # On the meta device lies what accelerate keeps on disk: nothing there can have changed.
                if not content.is_meta and _differs(tensor, partial(file.get_tensor, tensor.name), content):
                    changed[tensor.name] = Changed(tensor.name, tensor.dtype, content)
    return changed


def _require_place(names: Names, weights: Values, read: Mapping[str, str]) -> None:
    placed = {names.parameter(name) for name in read} | {None}
    lost = [key for key in weights if names.parameter(key) not in placed]
    if lost:
        raise CheckpointError(
            f"{len(lost)} weights of the model have no place in its checkpoint (first: {lost[0]}), so a change of "
            f"theirs would be lost; save the model with save_pretrained, and prune that folder"
        )


def _separate(separate: Mapping[str, torch.Tensor], name: str, model: PreTrainedModel) -> torch.Tensor:
    """One of the tensors that the loader had fused, by its name in the checkpoint, with the base prefix or without."""
    for spelling in (name, f"{model.base_model_prefix}.{name}", without_prefix(name)):
        if spelling in separate:
            return separate[spelling]
    raise CheckpointError(
        f"transformers cannot give {name} back from the weights it was fused into; save the model with "
        f"save_pretrained, and prune that folder"
    )


def _differs(tensor: headers.Tensor, read: Callable[[], torch.Tensor], content: torch.Tensor) -> bool:
    if tuple(content.shape) != tensor.shape:
        raise CheckpointError(
            f"{tensor.name} is {list(tensor.shape)} in the checkpoint and {list(content.shape)} in the model, so the "
            f"config no longer describes it; save the model with save_pretrained, and prune that folder"
        )
    return not torch.equal(read().to(content.dtype), content.detach().cpu())
