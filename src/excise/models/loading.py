"""Load a causal language model and its tokenizer from a local folder, a hub id or a GGUF file."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from excise.artefacts import read_json
from excise.errors import ArchitectureError, CheckpointError, InputError, MissingExtraError
from excise.models.architectures import architecture_of
from excise.models.claims import require_honest, require_honest_gguf
from excise.models.gguf_header import require_sound_gguf
from excise.models.headers import INDEX, Checkpoint, read_checkpoint
from excise.models.identity import WeightFiles, loaded_from
from excise.models.places import CPU, DISK, limited_map, own_map, streamed_map
from excise.models.quantised import find_format, load_dequantised
from excise.models.residency import hold_when_called, offload_folder
from excise.models.room import free_memory, needed, placement_for
from excise.models.stack import Stack, find_stack
from excise.plain import Facts
from excise.settings import DTYPES, PLACEMENTS
from excise.team import launched_here, rank_here

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Hub repositories often hold the same weights in several formats, of which only safetensors are read.
OTHER_WEIGHTS = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite",
    "consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "metal/*", "*.mlpackage/*",
]  # fmt: skip
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tokenization")
DEVICES = "auto, cpu, cuda, cuda:0, …"
# A name of `PLACEMENTS`, a file with a device map, or bytes of weights by device.
Placement = str | Path | Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be measured.

    Attributes:
        stack: the model as a stack of blocks.
        tokenizer: its tokenizer; None where it has none (or none that loads, where no text is to be read).
        source: what the user named.
        stored_dtype: dtype of most weights in the checkpoint, in which a pruned one is written.
        folder: where the checkpoint's files lie, for a hub id in the hub's cache; None for a GGUF file.

    """

    stack: Stack
    tokenizer: PreTrainedTokenizerBase
    source: str
    stored_dtype: torch.dtype
    folder: Path | None = None

    @property
    def raw_config(self) -> Facts | None:
        """What stands in its config.json, also what transformers drops; None for a GGUF file."""
        return None if self.folder is None else read_json(self.folder / "config.json")

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase = None) -> Loaded:
        """A causal language model that is in memory already.

        Args:
            model: of transformers, or its stack.
            tokenizer: its own, for whoever needs one.

        Raises:
            ArchitectureError: see `excise.models.stack.find_stack`.

        """
        stack = model if isinstance(model, Stack) else find_stack(model)
        return Loaded(stack, tokenizer, stack.model.config.name_or_path or "", stack.model.dtype)


def load(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement = "resident",
    quantisation: Any = None,
    reading: bool = True,
) -> Loaded:
    """Load a model.

    Args:
        source: a folder with a transformers checkpoint, a `.gguf` file, or a hub id.
        dtype: of the computation; `auto` is the checkpoint's own on a GPU and float32 on a CPU, where half precision
            is several times slower.
        device: `auto` spreads the model over the GPUs (and the CPU, if need be) through accelerate, or takes one GPU
            for each of several processes; without a GPU it is the CPU.
        trust_remote_code: run Python code that comes with the checkpoint. Never without an explicit wish.
        placement: "resident" holds all weights in memory; "streamed" holds one block's at a time and reads the others
            from the checkpoint's files when they run (see `excise.models.residency`); "auto" streams what would not
            leave room to work in. Bytes of weights by device (a GPU's number, "cpu") fill these in turn and leave the
            other blocks on the disk; a file is the user's own device map (see `excise.models.places`).
        quantisation: a quantisation config of transformers, to quantise plain weights while loading (a teacher's).
        reading: whether text is to be read; where not, a tokenizer that does not load is None.

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
        placement=placement,
        quantisation=quantisation,
        reading=reading,
    )
    return Loaded(find_stack(model), tokenizer, source, stored, checkpoint_folder(source))


def load_unread(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    known: bool = False,
    placement: Placement = "resident",
    quantisation: Any = None,
    reading: bool = True,
) -> tuple[Any, Any, torch.dtype]:
    """Load a model of any type, without reading it as a stack of blocks.

    Args:
        source: see `load`.
        dtype: see `load`.
        device: see `load`.
        trust_remote_code: see `load`.
        known: refuse a model type that excise does not know before its weights are read.
        placement: see `load`; only what excise knows can be streamed.
        quantisation: see `load`; such a model is for forward passes, so on a CPU too it stays quantised.
        reading: see `load`.

    Returns:
        The transformers model, its tokenizer, and the dtype of the weights in the checkpoint.

    Raises:
        InputError: no such model, or an unknown option.
        CheckpointError: truncated, corrupt or incomplete weights.
        ArchitectureError: a model type that transformers does not know, or, with `known`, excise.

    """
    place = device_map(dtype, device)
    if isinstance(placement, str) and placement not in PLACEMENTS:
        raise InputError(f"expected a placement in {', '.join(PLACEMENTS)}, got '{placement}'")
    if not isinstance(placement, str) and device != "auto":
        raise InputError(f"a device map, or memory by device, says where weights go; leave out --device {device}")
    folder = checkpoint_folder(source)
    arguments: Facts = {"trust_remote_code": trust_remote_code}
    if folder is not None:
        arguments["pretrained_model_name_or_path"] = str(folder)
    else:
        file = Path(source).expanduser()
        arguments |= {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        require_sound_gguf(file)
    with _clear_errors(source):
        config = AutoConfig.from_pretrained(**arguments)
    if known:
        architecture_of(config.model_type)
    # Headers first: a truncated or hostile file, or an adapter, is named before minutes of loading.
    headers = None if folder is None else read_checkpoint(folder)
    if headers is not None and folder is not None:
        require_honest(config, headers, folder)
    elif folder is None:
        require_honest_gguf(config, file)
    stored = torch.float32 if headers is None else _stored_dtype(headers, config)
    compute = _compute_dtype(dtype, stored, on_gpu=place != "cpu" and not _keeps_to_cpu(placement))
    with _clear_errors(source), _quiet():
        float8 = None if folder is None else find_format(folder, getattr(config, "quantization_config", None))
        loading = {
            "dtype": str(compute),
            "float8": asdict(float8) if float8 else None,
            "quantisation": quantisation.to_dict() if quantisation else None,
        }
        # Looked at before anything is read: a file replaced meanwhile then counts as changed.
        files = WeightFiles(_weight_files(source, folder, headers), loading)
        options = {
            "dtype": compute,
            "device_map": None if place == "cpu" and quantisation is None else place,
            # They are in the report, and refused below by name.
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
        }
        if headers is not None and placement == "auto":
            placement = placement_for(needed(headers, compute), free_memory("cuda" if place == "auto" else place))
        if placement not in ("auto", "resident") and (
            whole := _read_whole(source, folder, config, float8 is not None, quantisation)
        ):
            raise InputError(f"{whole}; use --placement resident")
        with _placed(config, place, placement, compute) as (placing, blocks_of):
            options |= placing
            if folder is None or float8 is None:
                given = {} if quantisation is None else {"quantization_config": quantisation}
                model, report = AutoModelForCausalLM.from_pretrained(**arguments, config=config, **options, **given)
                theirs = quantisation is None and getattr(model, "quantization_method", None) == "bitsandbytes"
                if theirs and place == "cpu":
                    # Its CPU kernels repack the weights at the first forward pass; gradients are wrong from then on.
                    model = model.dequantize()
            else:
                model, report = load_dequantised(folder, float8, config, **options)
            hold_when_called(blocks_of(model))
        tokenizer = _tokenizer(arguments, reading) if _has_tokenizer(folder) else None
    _require_complete(source, report, model)
    loaded_from(model, files)
    return model, tokenizer, stored


@dataclass(frozen=True, eq=False)
class Described:
    """What can be said of a checkpoint folder without reading a weight.

    Attributes:
        config: of the model.
        tokenizer: None where it has none, or none that loads.
        stored: dtype of the weights in the files.
        compute: that of the computation.
        files: of the weights.
        whole: why its weights cannot be streamed; empty where they can.

    """

    config: PretrainedConfig
    tokenizer: Any
    stored: torch.dtype
    compute: torch.dtype
    files: list[Path]
    whole: str


def described(source: str, dtype: str, place: str, trust_remote_code: bool) -> Described:
    """Describe a checkpoint folder by its config, its tokenizer and the headers of its files.

    Args:
        source: a folder or a hub id.
        dtype: see `load`.
        place: from `device_map`.
        trust_remote_code: see `load`.

    Raises:
        InputError: no such model.
        CheckpointError: truncated or incomplete files, or a config that claims far more than they hold.
        ArchitectureError: a model type that excise does not know.

    """
    folder = checkpoint_folder(source)
    if folder is None:
        raise InputError(f"expected a folder or a hub id, got {source}: a GGUF file is read whole")
    arguments: Facts = {"pretrained_model_name_or_path": str(folder), "trust_remote_code": trust_remote_code}
    with _clear_errors(source):
        config = AutoConfig.from_pretrained(**arguments)
        architecture_of(config.model_type)
        headers = read_checkpoint(folder)
        require_honest(config, headers, folder)
        float8 = find_format(folder, getattr(config, "quantization_config", None))
        tokenizer = _tokenizer(arguments, reading=False) if _has_tokenizer(folder) else None
    stored = _stored_dtype(headers, config)
    shards = list(dict.fromkeys(tensor.shard for tensor in headers.tensors))
    compute = _compute_dtype(dtype, stored, on_gpu=place != "cpu")
    whole = _read_whole(source, folder, config, float8 is not None, None)
    return Described(config, tokenizer, stored, compute, shards, whole)


def _read_whole(source: str, folder: Path | None, config: PretrainedConfig, plain: bool, quantisation: Any) -> str:
    """Why the weights cannot be streamed; empty where they can."""
    if folder is None:
        return f"{source} is read whole, as every GGUF file is (converted to safetensors it would not be)"
    method = getattr(config, "quantization_config", None)
    if quantisation is not None or (method is not None and not plain):
        return f"the weights of {source} are quantised by a tool that loads them whole"
    return ""


@contextlib.contextmanager
def _placed(
    config: PretrainedConfig, place: str, placement: Placement, dtype: torch.dtype
) -> Iterator[tuple[Facts, Callable[[PreTrainedModel], Sequence[nn.Module]]]]:
    """Options of `from_pretrained` that let blocks wait, and the blocks of what it gives; none if all are resident."""
    if placement in ("auto", "resident"):
        yield {}, lambda model: ()
        return
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    record = architecture_of(skeleton.config.model_type)
    if isinstance(placement, Path):
        places = own_map(skeleton, record.stack, placement)
    elif isinstance(placement, Mapping):
        places = limited_map(skeleton, record.stack, dtype, placement)
    else:
        places = streamed_map(skeleton, record.stack, "cuda:0" if place == "auto" else place)
    with offload_folder() as (folder, tie):

        def blocks_of(model: PreTrainedModel) -> Sequence[nn.Module]:
            tie(model)
            return list(model.get_submodule(record.stack).children())

        yield {"device_map": places, "offload_folder": folder}, blocks_of


def checkpoint_folder(source: str) -> Path | None:
    """Where the files of a checkpoint lie: a folder's own place, a hub id's in the hub's cache, downloaded if need be.

    Of a hub's repository everything is taken but other copies of the weights. Without a connection, what the cache has
    is used.

    Args:
        source: a folder, a `.gguf` file or a hub id.

    Returns:
        The folder; None for a GGUF file.

    Raises:
        InputError: no such model.
        CheckpointError: no safetensors weights, or the hub does not give them.

    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no GGUF file {source}")
        return None
    if path.is_file():
        raise InputError(f"{source} is a file of no known kind; expected a folder, a .gguf file or a hub id")
    if not path.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError(f"no folder {source}; expected a folder, a .gguf file or a hub id such as org/name")
        with _clear_errors(source):
            try:
                path = Path(snapshot_download(source, ignore_patterns=OTHER_WEIGHTS))
            except LocalEntryNotFoundError as error:
                if (incomplete := getattr(error, "snapshot_path", None)) is None:
                    raise
                # Offline; whether weights are among what is missing shows below.
                path = Path(incomplete)
    if not (path / "config.json").is_file():
        raise InputError(f"folder {source} has no config.json; expected a transformers checkpoint or a .gguf file")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"folder {source} has no .safetensors weights; pickle files (.bin) are not read, convert them first"
        )
    return path


def _has_tokenizer(folder: Path | None) -> bool:
    """Whether a folder has files of a tokenizer; weights alone can be pruned, and transformers would guess one."""
    return folder is None or any(path.name.startswith(TOKENIZER_FILES) for path in folder.iterdir())


def _weight_files(source: str, folder: Path | None, headers: Checkpoint | None) -> list[Path]:
    """The files that a model's weights come from; of the hub's cache too, where a blob may have been damaged since."""
    if folder is None or headers is None:
        return [Path(source).expanduser()]
    shards = list(dict.fromkeys(tensor.shard for tensor in headers.tensors))
    return [folder / INDEX, *shards] if (folder / INDEX).is_file() else shards


def _stored_dtype(checkpoint: Checkpoint, config: PretrainedConfig) -> torch.dtype:
    """Dtype of most plain weights, by bytes; where the weights are quantised, the one that the config names."""
    sizes = dict.fromkeys(PLAIN, 0)
    others = 0
    for tensor in checkpoint.tensors:
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.bytes
        else:
            others += tensor.bytes
    named = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if named is not None and others > sum(sizes.values()):
        return named
    return PLAIN[max(sizes, key=lambda name: sizes[name])] if any(sizes.values()) else named or torch.float32


def _tokenizer(arguments: Facts, reading: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
        # Some of what its files say is looked at only when it is used.
        tokenizer("A short sentence.")
        return tokenizer
    # Whatever a tokenizer raises, weights can be tested without it.
    except Exception:
        if reading:
            raise
        return None


def device_map(dtype: str, device: str) -> str:
    """Where a model goes, as accelerate calls it; checks the options of `load` that name dtype and device.

    Raises:
        InputError: an unknown dtype or device, or one that this machine lacks.

    """
    if dtype not in DTYPES:
        raise InputError(f"expected a dtype in {', '.join(DTYPES)}, got '{dtype}'")
    if device == "auto" and launched_here() > 1 and rank_here() < torch.cuda.device_count():
        # Of several processes each has a GPU of its own: spread over all, they would wait for each other.
        return f"cuda:{rank_here()}"
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"expected a device such as {DEVICES}, got '{device}'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu")
    return device


def _compute_dtype(dtype: str, stored: torch.dtype, on_gpu: bool) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return stored if on_gpu else torch.float32


def _keeps_to_cpu(placement: Placement) -> bool:
    """Whether a device map, or memory by device, names no GPU."""
    if isinstance(placement, str):
        return False
    if isinstance(placement, Mapping):
        return set(placement) <= {CPU}
    by_module = read_json(placement)
    # A file that holds no map is refused where it is read as one.
    return isinstance(by_module, dict) and {str(place) for place in by_module.values()} <= {CPU, DISK}


def _require_complete(source: str, report: Facts, model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    missing = set(map(str, report.get("missing_keys") or ()))
    # A base model, saved without its head, deserves its own advice.
    if missing and head is not None:
        own = {name for name, parameter in model.named_parameters() if any(parameter is p for p in head.parameters())}
        if missing <= own:
            others = sorted(map(str, report.get("unexpected_keys") or ()))
            instead = f" but another ({others[0]})" if others else ""
            raise CheckpointError(
                f"{source} has no language-model head{instead}, so it predicts no tokens to measure damage by; "
                f"take the checkpoint with the head. `excise prune --removed` takes this one as it is"
            )
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
    except MemoryError:
        raise
    # Whatever a config class or a tokenizer makes of fields that do not fit it.
    except Exception as error:
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
