"""Float8 checkpoints read with their scales.

transformers 5.23 does not know ModelOpt's format: it warns and loads the raw float8 values, without their scales; and
fine-grained float8 it dequantises to bfloat16 only, beside whatever dtype is asked for. The formats below are
dequantised here, weight by weight as the model takes them, and the model is then an ordinary one; a matrix that
changes is quantised anew in the layout it had.
Every other way in which a checkpoint holds float8 values is refused rather than read wrongly.

    weight = float8 values × scale,    scale per tensor, per row, or per block of the matrix
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float32, Shaped
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from excise.artefacts import read_json
from excise.errors import CheckpointError
from excise.models.headers import Checkpoint, read_checkpoint
from excise.plain import Facts, Values

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELOPT_FILE = "hf_quant_config.json"
FLOAT8 = ("F8_E4M3", "F8_E5M2")
PACKED = ("U8", "I8", "I32", "F4", "F6_E2M3", "F6_E3M2")
OTHER_SCALES = ("input_scale", "activation_scale", "k_scale", "v_scale", "q_scale", "output_scale", "kv_scale")
DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Format:
    """How a quantisation stores a matrix W: as W (float8) and its scale in a tensor of another name.

    Attributes:
        method: `quant_method` of the config.
        scale: what is appended to a weight's name to name its scale.
        block: rows and columns that share a scale, where scales come as a grid.

    """

    method: str
    scale: str
    block: tuple[int, int] = DEFAULT_BLOCK


@dataclass(frozen=True, eq=False)
class Dequantised:
    """A weight that is read and multiplied by its scale when it is asked for, as transformers asks: `weight[...]`."""

    weight: Any
    scale: Any
    block: tuple[int, int]

    def __getitem__(self, key: Any) -> Tensor:
        return dequantise(self.weight[...], self.scale[...], self.block)[key]


def find_format(folder: str | Path, settings: Values | None) -> Format | None:
    """Return the format in which to read a checkpoint folder, or None where transformers reads it rightly itself.

    Args:
        folder: the checkpoint.
        settings: `quantization_config` of its config, if any.

    Raises:
        CheckpointError: float8 or packed values in a format that neither transformers nor excise reads.

    """
    folder = Path(folder)
    settings = settings or _modelopt_settings(folder)
    method = str(settings.get("quant_method") or "") if settings else ""
    if method == "modelopt":
        algorithm = _algorithm(settings or {})
        if not algorithm.startswith("FP8"):
            raise CheckpointError(
                f"{folder} is quantised by ModelOpt with {algorithm or 'an algorithm it does not name'}; only its FP8 "
                f"can be dequantised here. Score the bfloat16 original: `excise prune` takes this checkpoint as it is"
            )
        return Format(method, "_scale", _block(settings or {}))
    if method == "fp8":
        return Format(method, "_scale_inv", _block(settings or {}))
    if method == "compressed-tensors" and "float" in str((settings or {}).get("format")):
        if (settings or {}).get("format") not in ("float-quantized", "naive-quantized"):
            raise CheckpointError(
                f"{folder} is quantised by compressed-tensors as {(settings or {}).get('format')}; only "
                f"float-quantized can be dequantised here. Score the bfloat16 original instead"
            )
        return Format(method, "_scale", _block(settings or {}))
    if not method:
        _refuse_raw_float8(folder)
    return None


def _modelopt_settings(folder: Path) -> Facts | None:
    """Older ModelOpt checkpoints say nothing in config.json."""
    path = folder / MODELOPT_FILE
    return {"quant_method": "modelopt", **read_json(path)} if path.is_file() else None


def _algorithm(settings: Values) -> str:
    return str(settings.get("quant_algo") or (settings.get("quantization") or {}).get("quant_algo") or "")


def _block(settings: Values) -> tuple[int, int]:
    """Rows and columns of a block, as each tool spells them."""
    candidates = [settings.get("weight_block_size")]
    for group in (settings.get("config_groups") or {}).values():
        candidates.append((group.get("weights") or {}).get("block_structure"))
    for size in candidates:
        if isinstance(size, list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return DEFAULT_BLOCK


def _refuse_raw_float8(folder: Path) -> None:
    raw = [tensor.name for tensor in read_checkpoint(folder).tensors if tensor.dtype in FLOAT8]
    if raw:
        raise CheckpointError(
            f"{folder} holds {len(raw)} float8 tensors (first: {raw[0]}), and its config does not say how they are "
            f"quantised; without their scales they would be read wrongly. Add the quantization_config of the tool that "
            f"wrote them"
        )


def load_dequantised(folder: Path, form: Format, config: PretrainedConfig, **options: Any) -> tuple[Any, Facts]:
    """Build the model of a checkpoint folder from dequantised weights.

    Args:
        folder: the checkpoint.
        form: as `find_format` found it.
        config: its transformers config; loses its quantisation settings, since the model's weights are plain.
        options: passed on to `from_pretrained`; among them `output_loading_info=True`.

    Returns:
        The model, and the report on missing, unexpected and mismatched weights.

    Raises:
        CheckpointError: as `lazy_weights`.

    """
    weights = lazy_weights(folder, form)
    if hasattr(config, "quantization_config"):
        # The weights are plain from here on, and transformers would treat them as quantised.
        del config.quantization_config
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, report = model_class.from_pretrained(None, config=config, state_dict=weights, **options)
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report


def lazy_weights(folder: str | Path, form: Format) -> Facts:
    """Weights by name, as transformers takes them: read when indexed, float8 ones multiplied by their scale.

    Scales of activations and of the KV cache are left out: activations are computed in full precision here.

    Raises:
        CheckpointError: a float8 weight has no scale, weights are packed, or the checkpoint is damaged.

    """
    checkpoint = read_checkpoint(folder)
    slices = _slices(checkpoint)
    names = {tensor.name: tensor for tensor in checkpoint.tensors}
    weights: Facts = {}
    for name, tensor in names.items():
        if is_scale(name, form, names):
            continue
        scale = slices.get(name + form.scale)
        if tensor.dtype in FLOAT8:
            if scale is None:
                raise CheckpointError(
                    f"{name} of {folder} is {tensor.dtype}, and there is no {name + form.scale}; without its scale it "
                    f"would be read wrongly"
                )
            weights[name] = Dequantised(slices[name], scale, form.block)
        elif tensor.dtype in PACKED and scale is not None:
            raise CheckpointError(
                f"{name} of {folder} is packed ({tensor.dtype}); only float8 can be dequantised here. Score the "
                f"bfloat16 original: `excise prune` takes this checkpoint as it is"
            )
        else:
            weights[name] = slices[name]
    return weights


def is_scale(name: str, form: Format, names: Container[str]) -> bool:
    """Whether a tensor is the scale of a weight, of activations or of the KV cache; `names` are all tensors'."""
    if name.rpartition(".")[2] in OTHER_SCALES:
        return True
    return name.endswith(form.scale) and name.removesuffix(form.scale) in names


def _slices(checkpoint: Checkpoint) -> Facts:
    slices: Facts = {}
    for shard in dict.fromkeys(tensor.shard for tensor in checkpoint.tensors):
        file = safe_open(shard, framework="pt")
        slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return slices


def dequantise(
    weight: Shaped[Tensor, "*shape"], scale: Shaped[Tensor, ...], block: tuple[int, int] = DEFAULT_BLOCK
) -> Float32[Tensor, "*shape"]:
    """Return float8 values times their scale, in float32.

    Args:
        weight: [..., rows, columns].
        scale: one number; one a row, [..., rows] or [..., rows, 1]; or a grid with one a block, [..., ⌈rows/b⌉,
            ⌈columns/c⌉], in which dimensions of size 1 between and behind may stand; [experts] for [experts, rows,
            columns]. Bytes (U8) are exponents: 2^(byte − 127).
        block: (b, c), rows and columns of a block; those at the edge may be smaller.

    Raises:
        CheckpointError: the shapes do not fit.

    Examples:
        >>> dequantise(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0], [1.0]])).tolist()
        [[10.0, 20.0], [3.0, 4.0]]

    """
    return weight.float() * _spread(_decoded(scale), weight.shape, block)


def quantise(
    weight: Shaped[Tensor, "*shape"],
    values: torch.dtype,
    scale: Shaped[Tensor, ...],
    block: tuple[int, int] = DEFAULT_BLOCK,
) -> tuple[Shaped[Tensor, "*shape"], Shaped[Tensor, ...]]:
    """Return float8 values and scales that stand for a weight, in the layout of scales that stood for another.

    The largest number of each group becomes the largest of float8; what is all zero keeps its scale.

    Args:
        weight: [..., rows, columns].
        values: float8 dtype.
        scale: as for `dequantise`; its shape and dtype are kept.
        block: likewise.

    Raises:
        CheckpointError: the shapes do not fit.

    Examples:
        >>> values, scale = quantise(torch.tensor([[448.0, 1.0], [0.0, 896.0]]), torch.float8_e4m3fn, torch.ones(2, 1))
        >>> values.float().tolist(), scale.tolist()
        ([[448.0, 1.0], [0.0, 448.0]], [[1.0], [2.0]])

    """
    wide, largest = weight.float(), torch.finfo(values).max
    # Which scale each number has, so that every layout is written down once.
    groups = _spread(torch.arange(scale.numel()).reshape(scale.shape), weight.shape, block).expand(weight.shape)
    most = torch.zeros(scale.numel()).scatter_reduce(0, groups.reshape(-1), wide.abs().reshape(-1).cpu(), "amax")
    new = _encoded((most / largest).reshape(scale.shape), scale.dtype)
    new = torch.where((most > 0).reshape(scale.shape), _decoded(new), _decoded(scale.cpu()))
    # A scale that was rounded down would take the largest number out of range, which float8 makes NaN.
    cast = (wide / _spread(new.to(wide.device), weight.shape, block)).clamp(-largest, largest).to(values)
    return cast, _encoded(new, scale.dtype)


def _decoded(scale: Tensor) -> Tensor:
    """Scales as numbers; stored as bytes they are E8M0: powers of two, their exponents biased by 127."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def _encoded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_decoded`; powers of two are rounded up."""
    if dtype not in (torch.uint8, torch.float8_e8m0fnu):
        return scale.to(dtype)
    exponents = scale.clamp(min=2.0**-127).log2().ceil()
    return (exponents + 127).to(torch.uint8) if dtype == torch.uint8 else exponents.exp2().to(dtype)


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Scales, in one of the layouts of `dequantise`, in a shape that broadcasts to that of their weight."""
    if scale.numel() == 1:
        return scale.reshape(())
    if len(shape) > 2 and scale.numel() == math.prod(shape[:-2]):
        return scale.reshape(*shape[:-2], 1, 1)
    if len(shape) >= 2:
        *experts, rows, columns = shape
        if scale.numel() == math.prod((*experts, rows)):
            return scale.reshape(*experts, rows, 1)
        grid = (*experts, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        if scale.numel() == math.prod(grid):
            per_row = scale.reshape(grid).repeat_interleave(block[0], dim=-2)[..., :rows, :]
            return per_row.repeat_interleave(block[1], dim=-1)[..., :columns]
    raise CheckpointError(
        f"a weight of shape {list(shape)} has scales of shape {list(scale.shape)}; expected one, one a row, or "
        f"one a block of {block[0]} × {block[1]}"
    )
