"""Load a causal language model and its tokenizer from a local folder, a hub id or a GGUF file."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from excise.errors import ArchitectureError, CheckpointError, InputError, MissingExtraError
from excise.models.architectures import architecture_of
from excise.models.headers import read_checkpoint
from excise.models.quantised import Format, find_format, load_dequantised
from excise.models.stack import Stack, find_stack
from excise.settings import DTYPES

DEVICES = "auto, cpu, cuda, cuda:0, …"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be measured.

    Attributes:
        stack: the model as a stack of blocks.
        tokenizer: its tokenizer.
        source: what the user named.
        stored_dtype: dtype of the weights in the checkpoint, in which a pruned one is written.

    """

    stack: Stack
    tokenizer: Any
    source: str
    stored_dtype: torch.dtype


def load(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantisation: Any = None,
) -> Loaded:
    """Load a model.

    Args:
        source: a folder with a transformers checkpoint, a `.gguf` file, or a hub id.
        dtype: of the computation; `auto` is the checkpoint's own on a GPU and float32 on a CPU, where half precision
            is several times slower.
        device: `auto` spreads the model over the GPUs (and the CPU, if need be) through accelerate; without a GPU it
            is the CPU.
        trust_remote_code: run Python code that comes with the checkpoint. Never without an explicit wish.
        quantisation: a quantisation config of transformers, to quantise plain weights while loading (a teacher's).

    Raises:
        InputError: no such model, or an unknown option.
        CheckpointError: truncated, corrupt or incomplete weights.
        ArchitectureError: a model type excise does not know.
        MissingExtraError: the weights are quantised by a tool whose package is not installed.

    """
    model, tokenizer, stored = load_unread(
        source,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        known=True,
        quantisation=quantisation,
    )
    return Loaded(find_stack(model), tokenizer, source, stored)


def load_unread(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    known: bool = False,
    quantisation: Any = None,
) -> tuple[Any, Any, torch.dtype]:
    """Load a model of any type, without reading it as a stack of blocks.

    Args:
        source: see `load`.
        dtype: see `load`.
        device: see `load`.
        trust_remote_code: see `load`.
        known: refuse a model type that excise does not know before its weights are read.
        quantisation: see `load`; such a model is for forward passes, so on a CPU too it stays quantised.

    Returns:
        The transformers model, its tokenizer, and the dtype of the weights in the checkpoint.

    Raises:
        InputError: no such model, or an unknown option.
        CheckpointError: truncated, corrupt or incomplete weights.
        ArchitectureError: a model type that transformers does not know, or, with `known`, excise.

    """
    if dtype not in DTYPES:
        raise InputError(f"expected a dtype in {', '.join(DTYPES)}, got '{dtype}'")
    arguments = _source_arguments(source)
    arguments["trust_remote_code"] = trust_remote_code
    with _clear_errors(source):
        config = AutoConfig.from_pretrained(**arguments)
    if known:
        architecture_of(config.model_type)
    place = _device_map(device)
    compute = _compute_dtype(dtype, config, on_gpu=place != "cpu")
    with _clear_errors(source), _quiet():
        _check_headers(source)
        options = {
            "dtype": compute,
            "device_map": None if place == "cpu" and quantisation is None else place,
            "ignore_mismatched_sizes": True,  # they are in the report, and refused below by name
            "output_loading_info": True,
        }
        if (float8 := _float8_format(source, config)) is None:
            given = {} if quantisation is None else {"quantization_config": quantisation}
            model, report = AutoModelForCausalLM.from_pretrained(**arguments, config=config, **options, **given)
            theirs = quantisation is None and getattr(model, "quantization_method", None) == "bitsandbytes"
            if theirs and place == "cpu":
                # Its CPU kernels repack the weights at the first forward pass; gradients are wrong from then on.
                model = model.dequantize()
        else:
            model, report = load_dequantised(Path(source).expanduser(), float8, config, **options)
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    _require_complete(source, report)
    stored = torch.float32 if "gguf_file" in arguments else (getattr(config, "dtype", None) or compute)
    return model, tokenizer, stored


def _source_arguments(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no GGUF file {source}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"folder {source} has no config.json; expected a transformers checkpoint or a .gguf file")
        if not any(path.glob("*.safetensors")):
            raise CheckpointError(
                f"folder {source} has no .safetensors weights; pickle files (.bin) are not read, convert them first"
            )
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        raise InputError(f"{source} is a file of no known kind; expected a folder, a .gguf file or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"no folder {source}; expected a folder, a .gguf file or a hub id such as org/name")
    return {"pretrained_model_name_or_path": source, "use_safetensors": True}


def _check_headers(source: str) -> None:
    """Read every local shard's header: a truncated or hostile file is named before minutes of loading."""
    if Path(source).expanduser().is_dir():
        read_checkpoint(Path(source).expanduser())


def _float8_format(source: str, config: Any) -> Format | None:
    """In which format float8 weights are to be dequantised here; None where transformers reads the weights rightly."""
    path = Path(source).expanduser()
    settings = getattr(config, "quantization_config", None)
    if path.is_dir():
        return find_format(path, settings)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method in ("modelopt", "fp8"):
        raise InputError(
            f"{source} is quantised ({method}) in a way that transformers does not read rightly everywhere; download "
            f"it (`hf download {source} --local-dir FOLDER`) and pass the folder, which excise dequantises"
        )
    return None


def _device_map(device: str) -> str:
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"expected a device such as {DEVICES}, got '{device}'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu")
    return device


def _compute_dtype(dtype: str, config: Any, on_gpu: bool) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return getattr(config, "dtype", None) or torch.float32 if on_gpu else torch.float32


def _require_complete(source: str, report: dict[str, Any]) -> None:
    for kind, meaning in (
        ("missing_keys", "are not in the checkpoint and would be random"),
        ("mismatched_keys", "have another shape than the config says"),
        ("unexpected_keys", "are in the checkpoint but not in the model: the config does not fit it"),
        ("error_msgs", "could not be loaded"),
    ):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise CheckpointError(f"{source}: {len(names)} weights {meaning} (first: {', '.join(names[:3])})")


@contextlib.contextmanager
def _clear_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, InputError, ArchitectureError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{source}: weights are truncated or corrupt ({error})") from error
    except ImportError as error:
        text = str(error).strip().split("\n")[0]
        raise MissingExtraError(f"{source} needs a package that is not installed: {text}") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{source} comes with Python code of its own; read it, then pass --trust-remote-code to run it"
            ) from error
        if "model type" in str(error) and "Transformers" in str(error):
            raise ArchitectureError(
                f"{source}: transformers {transformers.__version__} does not know it: {text}"
            ) from error
        raise CheckpointError(f"cannot load {source}: {type(error).__name__}: {text}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence loading bars and advice: what matters of them is checked and raised as an error."""
    bar, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
