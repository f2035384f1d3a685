"""How a checkpoint stores the parameters of the model that was loaded from it: in a plain dtype, or as float8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from excise.artefacts import read_json
from excise.errors import ArchitectureError
from excise.models import headers
from excise.models.headers import Checkpoint, read_checkpoint
from excise.models.names import Names
from excise.models.quantised import FLOAT8, Format, dequantise, find_format, quantise

if TYPE_CHECKING:
    from excise.models.loading import Loaded

FLOAT8_DTYPES = dict(zip(FLOAT8, (torch.float8_e4m3fn, torch.float8_e5m2), strict=True))


@dataclass(frozen=True, eq=False)
class Float8:
    """A matrix as it lies in a checkpoint.

    Attributes:
        values: its tensor.
        scale: that of its scales.
        block: rows and columns that share a scale, where scales come as a grid.

    """

    values: headers.Tensor
    scale: headers.Tensor
    block: tuple[int, int]

    def read(self) -> Tensor:
        """The weight, in float32."""
        return dequantise(_content(self.values), _content(self.scale), self.block)

    def quantised(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scales for another weight of the same shape, as they would lie there."""
        return quantise(weight, FLOAT8_DTYPES[self.values.dtype], _content(self.scale), self.block)

    def rounded(self, weight: Tensor) -> Tensor:
        """What would be read of another weight, in float32."""
        values, scale = self.quantised(weight)
        return dequantise(values, scale.to(values.device), self.block)


@dataclass(frozen=True, eq=False)
class Stored:
    """How the parameters of a model are stored.

    Attributes:
        dtype: of the plain ones.
        float8: by the parameter's name, those that are float8.
        fused: names of parameters that the loader makes of several float8 tensors.

    """

    dtype: torch.dtype
    float8: Mapping[str, Float8] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()

    @staticmethod
    def of(loaded: Loaded) -> Stored:
        """Of a loaded model; where it came from a folder, asks its headers."""
        if loaded.folder is None or (form := format_of(loaded.folder)) is None:
            return Stored(loaded.stored_dtype)
        names = Names(loaded.stack.model)
        alone: dict[str, Float8] = {}
        fused: set[str] = set()
        for name, matrix in float8_of(read_checkpoint(loaded.folder), form).items():
            key = names.key(name)
            if key is not None and names.is_converted(name):
                fused.add(key)
            elif key is not None:
                alone[key] = matrix
        return Stored(loaded.stored_dtype, alone, frozenset(fused))

    def refusal(self, names: Iterable[str]) -> ArchitectureError | None:
        """Why new values of parameters could not be stored; None where they can."""
        if lost := self.fused.intersection(names):
            return ArchitectureError(
                f"{min(lost)} is made of several float8 tensors, to which a repair is not rounded here; repair the "
                f"bfloat16 original, or heal by training"
            )
        return None

    def rounded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name as they would be read back once stored; float8 ones in float32."""
        return {
            name: self.float8[name].rounded(weight) if name in self.float8 else weight.to(self.dtype)
            for name, weight in weights.items()
        }


def format_of(folder: Path) -> Format | None:
    """The float8 format of a checkpoint folder; None for other forms."""
    return find_format(folder, read_json(folder / "config.json").get("quantization_config"))


def float8_of(checkpoint: Checkpoint, form: Format) -> dict[str, Float8]:
    """The float8 matrices of a checkpoint that have scales, by their names there."""
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    return {
        name: Float8(tensor, tensors[name + form.scale], form.block)
        for name, tensor in tensors.items()
        if tensor.dtype in FLOAT8 and name + form.scale in tensors
    }


def _content(tensor: headers.Tensor) -> Tensor:
    with safe_open(tensor.shard, framework="pt") as file:
        content: Tensor = file.get_tensor(tensor.name)
    return content
