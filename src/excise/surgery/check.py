"""How far a checkpoint that was written can be tested on this machine, and that test.

Where the original and the pruned model fit in memory together, logits and generation are compared. Where they do not,
or the original gives no logits, stock transformers is asked whether it finds every weight by name and shape, which
takes no memory. Nothing is ever loaded that does not fit. What cannot be tested here is told, and is no failure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from excise.errors import ExciseError, MissingExtraError, UntestableError
from excise.models.headers import read_checkpoint
from excise.models.loading import Placement, device_map, load
from excise.models.quantised import is_scale
from excise.models.residency import is_offloaded
from excise.models.room import free_everywhere
from excise.models.stack import Stack
from excise.models.stored import format_of
from excise.surgery.config import kept_blocks
from excise.surgery.files_test import wrong_files
from excise.surgery.on_disk import original_indices, read_source
from excise.surgery.proof import Proof, Report
from excise.surgery.self_test import (
    STOCK_NAMES,
    in_fresh_process,
    judge_loading,
    judge_numbers,
    probe,
    reference_logits,
    self_test,
    wrong_names,
)
from excise.surgery.stock_load import compare

BYTES_PER_PARAMETER = 4.0  # float32, in which models are computed on a CPU; on a GPU it is half of it
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def check_pruned(
    source: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement = "auto",
) -> Report:
    """Test a checkpoint that was pruned from file to file, as well as it can be here.

    Args:
        source: the original, a folder or a `.gguf` file.
        removed: original indices.
        out: what was written.
        dtype: of the computation, as for `excise.models.loading.load`.
        device: where to compute, likewise.
        trust_remote_code: run Python code that comes with the checkpoint.
        placement: "streamed", a device map or memory by device compares logits of models that do not fit in memory,
            reading each several times; what does not fit is otherwise compared by names.

    Returns:
        What `excise.surgery.self_test.self_test` does. Where a fresh process cannot load the format, the model was
        loaded in this one, and `loads_in_stock_transformers` is None; where only names could be compared, there are
        `loads_in_stock_transformers`, `missing_keys`, `unexpected_keys`, `mismatched_keys` and `weights`.

    Raises:
        InputError: an unknown dtype or device.

    """
    device_map(dtype, device)
    source, out = Path(source).expanduser(), Path(out)
    needed, free = 2 * memory_needed(source), free_everywhere()
    placement = "resident" if placement == "auto" else placement
    if needed > free and placement == "resident":
        return names_test(source, removed, out, _too_large("original and pruned model take", needed, free))
    try:
        loaded = load(
            str(source),
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            placement=placement,
            reading=False,
        )
    except Exception as error:  # whatever loading and a first forward pass raise
        return names_test(source, removed, out, f"the original gives no logits: {error}")
    return check_loaded(loaded.stack, removed, out, source=source)


def check_loaded(
    stack: Stack,
    removed: Sequence[int],
    out: str | Path,
    input_ids: torch.Tensor | None = None,
    *,
    source: Path | None = None,
    sublayers: Sequence[int] = (),
    stored: torch.dtype | None = None,
) -> Report:
    """Compare what was written with the original, which is in memory, its gates at 0.

    Args:
        stack: the original.
        removed: original indices.
        out: what was written, a folder or a `.gguf` file.
        input_ids: token ids to compare on, see `excise.surgery.self_test.self_test`.
        source: where the original's files lie, if they do.
        sublayers: gates of sublayers removed by themselves.
        stored: dtype in which weights that changed in memory were written; None where none changed.

    Returns:
        As `check_pruned` does.

    """
    out = Path(out)
    streamed = any(is_offloaded(block.module) for block in stack.blocks)
    try:
        needed, free = 0 if streamed else memory_needed(out), free_everywhere()
        reload = out.is_file() or format_of(out) is not None
    except ExciseError as error:
        return Proof(failed=[f"its files do not read back ({error})"]).report()
    if needed > free:
        return names_test(source, removed, out, _too_large("the pruned model takes", needed, free))
    if reload or streamed:
        return reload_test(stack, removed, out, input_ids, "streamed" if streamed else "resident")
    folder = source if source is not None and source.is_dir() else None
    return self_test(stack, removed, out, input_ids, sublayers=sublayers, source=folder, stored=stored)


def memory_needed(source: Path) -> int:
    """Bytes that a checkpoint takes once loaded in float32."""
    if source.is_file():
        import gguf

        return int(BYTES_PER_PARAMETER * sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(source).tensors))
    return int(BYTES_PER_PARAMETER * sum(tensor.elements for tensor in read_checkpoint(source).tensors))


def _too_large(what: str, needed: int, free: int) -> str:
    return f"{what} {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"


def names_test(source: Path | None, removed: Sequence[int], out: Path, reason: str) -> Report:
    """Compare names and shapes with what stock transformers expects, and say why no more was tested.

    A head that the checkpoint lacks, and tensors that the model has no place for, are the original's own where it is
    the same there.

    Args:
        source: the original, if it lies on this machine.
        removed: original indices.
        out: what was written.
        reason: why logits were not compared.

    """
    proof = Proof()
    proof.judge("files", wrong_files(out))
    if proof.failed:
        return proof.report()
    proof.leave(reason, "logits", "generates")
    if out.is_file():
        proof.leave(reason, "names")
        return proof.report()
    form = format_of(out)
    options = ["plain"] if form else []
    folder = source if source is not None and source.is_dir() else None
    try:
        report = in_fresh_process(STOCK_NAMES, out, *options, timeout_s=1800.0)
    except UntestableError as error:
        proof.leave(str(error), "names")
        return proof.report()
    if "load_error" in report:
        proof.facts = {"transformers": report["transformers"]}
        judge_loading(proof, report["load_error"], folder, *options)
        return proof.report()
    if form:
        stored = {tensor.name for tensor in read_checkpoint(out).tensors}
        scales = {name for name in stored if is_scale(name, form, stored)}
        report["unexpected_keys"] = sorted(set(report["unexpected_keys"]) - scales)
    proof.facts = {**report, "loads_in_stock_transformers": None if form else report["is_stock"] and not _wrong(report)}
    explained = _explained(report, folder, removed, options) if folder and _wrong(report) else report
    proof.judge("names", wrong_names(explained))
    return proof.report()


def _wrong(report: Report) -> bool:
    return any(report[kind] for kind in KEYS)


def _explained(report: Report, source: Path, removed: Sequence[int], options: list[str]) -> Report:
    """The keys that are wrong, without those that are in the original, and of which no block is made."""
    try:
        original = in_fresh_process(STOCK_NAMES, source, *options, timeout_s=1800.0)
    except UntestableError:
        return report
    if "load_error" in original:
        return report
    whole = read_source(source)
    kept = kept_blocks(whole.blocks, original_indices(removed, whole.blocks))
    blocks = whole.architecture.stack.rpartition(".")[2]

    def there(name: str) -> str:
        """The name that a tensor has in the original."""
        return re.sub(rf"\b{re.escape(blocks)}\.(\d+)\.", lambda m: f"{blocks}.{_old(kept, int(m[1]))}.", name)

    allowed = {**{kind: set(original[kind]) for kind in KEYS}, "missing_keys": set(original["head"])}
    return {kind: [n for n in report[kind] if there(n) not in {*allowed[kind]} & {*original[kind]}] for kind in KEYS}


def _old(kept: Sequence[int], new: int) -> int:
    return kept[new] if new < len(kept) else new


def reload_test(
    stack: Stack,
    removed: Sequence[int],
    out: Path,
    input_ids: torch.Tensor | None = None,
    placement: str = "resident",
) -> Report:
    """Load what was written, in this process, and compare it with the original whose gates are at 0.

    It is computed in the original's dtype, and on GPUs where the original is. A streamed model generates nothing: every
    token would read all its weights.
    """
    proof = Proof()
    proof.judge("files", wrong_files(out))
    if proof.failed:
        return proof.report()
    ids, new_tokens = probe(stack, input_ids)
    if placement == "streamed":
        proof.leave("every token would read all weights of a model that is streamed", "generates")
        new_tokens = 0
    expected = reference_logits(stack, removed, ids)
    dtype = str(stack.model.dtype).removeprefix("torch.")
    device = "auto" if stack.device.type == "cuda" else str(stack.device)
    try:
        model = load(str(out), dtype=dtype, device=device, placement=placement, reading=False).stack.model
    except MissingExtraError as error:
        proof.leave(str(error), "names", "logits", "generates")
        return proof.report()
    except ExciseError as error:
        proof.failed.append(f"it does not load: {error}")
        return proof.report()
    proof.judge("names", None)  # else it had not loaded
    found = compare(model, ids, expected, new_tokens)
    errors = {name: found.pop(name) for name in [*found] if name.endswith("_error")}
    proof.facts = {
        "loads_in_stock_transformers": None if out.is_dir() and format_of(out) else True,
        "without_excise": False,
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **found,
    }
    judge_numbers(proof, stack, ids, errors, new_tokens)
    return proof.report()
