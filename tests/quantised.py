"""Writers of quantised tiny checkpoints: ModelOpt's FP8, transformers' fine-grained FP8, compressed-tensors' float8."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 16
MATRIX = re.compile(r".*\.layers\.(\d+)\..*(proj|fc\d|w\d|linear)\.weight")
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(folder: Path, form: str, *, keep: tuple[str, ...] = ()) -> Path:
    """Quantise a folder that holds one `model.safetensors`, in place.

    Args:
        folder: the checkpoint.
        form: "modelopt", "modelopt-channel" (a scale a row), "fp8" (blocks of 16 × 16) or "compressed-tensors".
        keep: parts of names of modules that stay as they are; they go into the list of exceptions.

    """
    weights, ignored = {}, ["lm_head"]
    for name, weight in load_file(folder / "model.safetensors").items():
        if not MATRIX.fullmatch(name):
            weights[name] = weight
        elif any(part in name for part in keep):
            weights[name] = weight
            ignored.append(name.removesuffix(".weight"))
        else:
            weights |= _quantised(name, weight.float(), form)
            if form.startswith("modelopt") and name.endswith(("k_proj.weight", "v_proj.weight")):
                kind = name.split(".")[-2][0]
                weights[name.replace(".weight", f".{kind}_scale")] = torch.tensor(0.5 + len(weights) / 7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": _settings(form, ignored)}))
    if form.startswith("modelopt"):
        own = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ignored}
        settings = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": own}
        (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    return folder


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a quantised folder times their scales, element by element, by the formats' definitions."""
    stored = load_file(folder / "model.safetensors")
    plain = {}
    for name, weight in stored.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        if scale is None:
            plain[name] = weight.float()
        elif f"{name}_scale_inv" in stored:
            plain[name] = weight.float().clone()
            for row in range(weight.shape[0]):
                for column in range(weight.shape[1]):
                    plain[name][row, column] *= scale[row // BLOCK, column // BLOCK].float()
        else:
            plain[name] = torch.stack(
                [row.float() * s.float() for row, s in zip(weight, scale.expand(len(weight), 1), strict=True)]
            )
    return plain


def _quantised(name: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    if form == "fp8":
        rows, columns = weight.shape
        grid = torch.ones(-(-rows // BLOCK), -(-columns // BLOCK))
        values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                grid[i, j] = weight[part].abs().max() / LARGEST
                values[part] = (weight[part] / grid[i, j]).to(torch.float8_e4m3fn)
        return {name: values, f"{name}_scale_inv": grid}
    per_row = form in ("modelopt-channel", "compressed-tensors")
    scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST if per_row else weight.abs().max() / LARGEST
    values = (weight / scale).to(torch.float8_e4m3fn)
    if form == "modelopt":
        scales = {f"{name}_scale": scale.reshape(1)[0], name.replace(".weight", ".input_scale"): torch.tensor(0.02)}
    else:
        scales = {f"{name}_scale": scale}
    return {name: values, **scales}


def _settings(form: str, ignored: list[str]) -> dict:
    if form == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ignored,
        }
    if form == "compressed-tensors":
        group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }
    algorithm = "FP8" if form == "modelopt" else "FP8_PER_CHANNEL_PER_TOKEN"
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ignored}
