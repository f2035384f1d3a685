"""How far a checkpoint pruned on disk can be tested on this machine, and that test.

Where the original and the pruned model fit in memory together, logits are compared. Where they do not, stock
transformers is asked whether it finds every weight by name and shape, which takes no memory. Nothing is ever loaded
that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from excise.artefacts import read_json
from excise.errors import (
    ArchitectureError,
    CheckpointError,
    HeadlessError,
    InputError,
    MissingExtraError,
    UntestableError,
)
from excise.models.headers import read_checkpoint
from excise.models.loading import load
from excise.models.quantised import find_format, is_scale
from excise.models.stack import Stack, gated
from excise.surgery.self_test import in_fresh_process, probe, self_test
from excise.surgery.stock_load import compare_generation
from excise.surgery.verdict import TOLERANCE_IN_HALF

STOCK_NAMES = Path(__file__).with_name("stock_names.py")
BYTES_PER_PARAMETER = 4.0  # float32, in which models are computed on a CPU; on a GPU it is half of it
NEW_TOKENS = 12


def check_pruned(
    source: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Test a checkpoint that was pruned from file to file, as well as it can be here.

    Args:
        source: the original, a folder or a `.gguf` file.
        removed: original indices.
        out: what was written.
        dtype: of the computation, as for `excise.models.loading.load`.
        device: where to compute, likewise.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        `level`: "logits" with what `excise.surgery.self_test.self_test` returns (where a fresh process cannot load the
        format, the model was loaded in this one, and `loads_in_stock_transformers` is None); "names" with
        `loads_in_stock_transformers`, `missing_keys`, `unexpected_keys`, `mismatched_keys` and `weights`; or "none".
        With the latter two, `reason` says why no more was tested.

    Raises:
        CheckpointError: the checkpoint does not load, or lacks weights.

    """
    source, out = Path(source).expanduser(), Path(out)
    needed, free = 2 * memory_needed(source), memory_free()
    if needed > free:
        reason = f"original and pruned model take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
        return {"level": "none", "reason": reason} if out.is_file() else names_test(out, reason, source)
    try:
        loaded = load(str(source), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except MissingExtraError as error:
        return {"level": "none", "reason": str(error)}
    except (HeadlessError, InputError, ArchitectureError) as error:
        # The original does not load as a language model here, and did before; its files can still be looked at.
        return names_test(out, str(error), source) if out.is_dir() else {"level": "none", "reason": str(error)}
    except CheckpointError as error:
        if not _needs_a_tool(source):
            raise
        return names_test(out, str(error), source) if out.is_dir() else {"level": "none", "reason": str(error)}
    return check_loaded(loaded.stack, removed, out)


def check_loaded(
    stack: Stack, removed: Sequence[int], out: Path, input_ids: torch.Tensor | None = None
) -> dict[str, Any]:
    """Compare logits of what was written with those of the original, which is in memory, its gates at 0.

    Args:
        stack: the original.
        removed: original indices.
        out: what was written, a folder or a `.gguf` file.
        input_ids: token ids to compare on, see `excise.surgery.self_test.self_test`.

    Returns:
        As `check_pruned` does, of the level "logits".

    Raises:
        CheckpointError: the checkpoint does not load, or lacks weights.

    """
    if out.is_file() or _float8(out) is not None:
        return reload_test(stack, removed, out, input_ids)
    try:
        return {"level": "logits", **self_test(stack, removed, out, input_ids)}
    except UntestableError as error:
        return {"level": "none", "reason": str(error)}


def memory_needed(source: Path) -> int:
    """Bytes that a checkpoint takes once loaded in float32."""
    if source.is_file():
        import gguf

        return int(BYTES_PER_PARAMETER * sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(source).tensors))
    return int(BYTES_PER_PARAMETER * sum(tensor.elements for tensor in read_checkpoint(source).tensors))


def memory_free() -> int:
    """Bytes free in main memory and on all GPUs."""
    on_gpus = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return int(psutil.virtual_memory().available + on_gpus)


def _needs_a_tool(source: Path) -> bool:
    """Whether the weights are stored in a way that not every installation reads: packed, or as GGUF."""
    return source.is_file() or bool(read_json(source / "config.json").get("quantization_config"))


def _float8(folder: Path) -> Any:
    return find_format(folder, read_json(folder / "config.json").get("quantization_config"))


def names_test(folder: Path, reason: str, source: Path) -> dict[str, Any]:
    """Whether stock transformers finds every weight by name and shape; `reason` says why no more is tested.

    What it does not find in the original either (a head that it never had) is not held against the surgery.

    Raises:
        CheckpointError: the config does not load.

    """
    form = _float8(folder)
    try:
        report = in_fresh_process(STOCK_NAMES, folder, *(["plain"] if form else []), timeout_s=1800.0)
    except CheckpointError as error:
        if not _needs_a_tool(folder) and not _has_own_code(folder) and not isinstance(error, UntestableError):
            raise
        return {"level": "none", "reason": f"{reason}; and {str(error).splitlines()[-1]}"}
    if form:
        stored = {tensor.name for tensor in read_checkpoint(folder).tensors}
        scales = {name for name in stored if is_scale(name, form, stored)}
        report["unexpected_keys"] = sorted(set(report["unexpected_keys"]) - scales)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if any(report[kind] for kind in kinds):
        original = in_fresh_process(STOCK_NAMES, source, *(["plain"] if form else []), timeout_s=1800.0)
        for kind in kinds:
            known = {_numberless(name) for name in original[kind]}
            report[kind] = [name for name in report[kind] if _numberless(name) not in known]
    wrong = any(report[kind] for kind in kinds)
    stock = None if form else report["is_stock"] and not wrong
    return {
        "level": "names",
        "reason": reason,
        "loads_in_stock_transformers": stock,
        "names_agree": not wrong,
        **report,
    }


def _numberless(name: str) -> str:
    """A tensor's name with every number as N: a block has another number once those below it are gone."""
    return re.sub(r"\d+", "N", name)


def _has_own_code(folder: Path) -> bool:
    return bool(read_json(folder / "config.json").get("auto_map"))


@torch.no_grad()
def reload_test(
    stack: Stack, removed: Sequence[int], out: Path, input_ids: torch.Tensor | None = None
) -> dict[str, Any]:
    """Load what was written, in this process, and compare it with the original whose gates are at 0.

    It is computed in the original's dtype, and on GPUs where the original is.

    Raises:
        CheckpointError: it does not load, or lacks weights.

    """
    input_ids, new_tokens = probe(stack, input_ids, NEW_TOKENS)
    input_ids = input_ids.to(stack.device)
    alpha = torch.ones(len(stack.blocks))
    alpha[list(removed)] = 0
    with gated(stack, alpha):
        expected = stack.model(input_ids=input_ids, use_cache=False).logits.double().cpu()
    dtype = str(stack.model.dtype).removeprefix("torch.")
    device = "auto" if stack.device.type == "cuda" else str(stack.device)
    model = load(str(out), dtype=dtype, device=device).stack.model
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits.double().cpu()
    return {
        "level": "logits",
        # Packed weights are dequantised to the same numbers on both sides; only the order of sums may differ.
        "tolerance": TOLERANCE_IN_HALF,
        "loads_in_stock_transformers": True if out.is_file() else None,
        "max_abs_logit_difference": (logits - expected).abs().max().item(),
        "max_abs_logit": expected.abs().max().item(),
        **compare_generation(model, input_ids.to(model.device), new_tokens),
        "without_excise": False,
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
