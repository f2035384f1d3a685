"""Identity of a model: one SHA-256 that changes with every byte of its weights, with its config and with its dtype.

Everything kept between calls is kept under it, so it is asked for often and must cost little. Weights that come
straight from files are known by the files' bytes. What was changed since, such as the few matrices of a repair, is
known by the bytes in memory, read once for each state of a tensor:

    identity = SHA-256(config, for each weight: name, dtype, shape, and "this tensor of these files" or its bytes' hash)

A tensor is in the state in which it was seen before if it is the same object with the same storage (not only the same
address, which the next tensor may get), layout and version counter. PyTorch's counter moves with every ordinary change
in place, under `no_grad` too. It does not move with writes past autograd: through `p.data` or a NumPy view, by a fused
optimiser, or into another tensor that was assigned as `p.data`. Against these a sample of each tensor's elements is
compared, which sees what changes them at large; after a write that may change a few elements only, call
`torch.autograd.graph.increment_version`.

Buffers that are not saved are computed from the config (and by some models rewritten in every forward pass): they are
left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from excise.errors import CheckpointError
from excise.models.file_hashes import THREADS, Stat, sha256_of_each
from excise.models.residency import replacements
from excise.plain import Values

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Of a tensor on a GPU, copied at a time.
CHUNK_BYTES = 1 << 26
# Elements of a tensor, at least where it has so many.
SAMPLED = 64
UNSTABLE = ("_name_or_path", "transformers_version")


class WeightFiles:
    """The files that a model was loaded from, as they were then.

    Args:
        paths: in a fixed order.
        loading: everything else that decides which numbers come out of the bytes, as JSON values.

    """

    def __init__(self, paths: Sequence[Path], loading: Values) -> None:
        self._paths = tuple(paths)
        self._loading = json.dumps(loading, sort_keys=True, default=str)
        self._stats = self._current()
        self._identity: str | None = None

    def identity(self) -> str | None:
        """SHA-256 over files and loading; None if a file was changed after the model was loaded and before now."""
        if self._identity is None and self._current() == self._stats:
            # Looked at before and after: a file may be replaced while it is hashed.
            hashes = sha256_of_each(self._paths)
            if self._current() == self._stats:
                facts = [[(path.name, sha) for path, sha in zip(self._paths, hashes, strict=True)], self._loading]
                self._identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return self._identity

    def _current(self) -> tuple[Stat | None, ...]:
        return tuple(Stat.of(path) if path.is_file() else None for path in self._paths)


@dataclass(frozen=True)
class _Stored:
    """The bytes of a weight, as "what this name is in these files"."""

    files: WeightFiles
    name: str


_Source = str | _Stored  # a hash of bytes, or a place in files


@dataclass(frozen=True, eq=False)
class _Seen:
    """A state in which a tensor was seen, and where its bytes come from.

    The weak reference keeps the storage's record (not its bytes), so that no other storage gets its address.
    """

    layout: tuple[Any, ...]
    version: object
    sample: bytes
    storage: StorageWeakRef
    source: _Source


_FILES: WeakKeyDictionary[Any, WeightFiles] = WeakKeyDictionary()
_SEEN = WeakTensorKeyDictionary()  # tensor → its states that can come back


def model_identity(model: PreTrainedModel) -> str:
    """SHA-256 that two models share only if config, dtypes and every byte of their weights are the same.

    The reverse does not hold: a model changed in memory has another identity than the same one loaded from files.

    Args:
        model: a transformers model, in memory or offloaded by accelerate.

    Raises:
        CheckpointError: weights are on the meta device, and it is not known from which files they would come.

    """
    files = _FILES.get(model)
    quantised = bool(getattr(model, "is_quantized", False))
    # Scales of a quantisation are in the state dict only; a model from files needs none of them.
    weights = model.state_dict() if quantised and files is None else _weights(model)
    sources = _sources(model, weights, quantised)
    digest = hashlib.sha256(json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str).encode())
    digest.update(_own_code(model))
    for name in sorted(weights):
        tensor = weights[name]
        form = None if _is_packed(tensor, quantised) else [str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps([name, form, sources[name]]).encode())
    return digest.hexdigest()


def loaded_from(model: PreTrainedModel, files: WeightFiles) -> None:
    """Tell that a model's weights are now exactly what loading gave, so that its identity needs none of them read."""
    _FILES[model] = files
    quantised = bool(getattr(model, "is_quantized", False))
    for name, tensor in _weights(model).items():
        if not tensor.is_meta:
            _remember(tensor, _is_packed(tensor, quantised), _Stored(files, name))


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Context that ends with the weights as they were, to the last bit, though perhaps in other memory.

    What is known of them then holds for their new place. Only tensors that are known at the start are carried over:
    nothing is read.
    """
    quantised = bool(getattr(model, "is_quantized", False))
    known = []
    for tensor in _weights(model).values():
        packed = _is_packed(tensor, quantised)
        if not tensor.is_meta and (source := _recall(tensor, packed)) is not None:
            known.append((tensor, packed, (tensor.dtype, tensor.shape), source))
    try:
        yield
    finally:
        for tensor, packed, form, source in known:
            if (tensor.dtype, tensor.shape) == form:
                _remember(tensor, packed, source)


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones under each of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _is_packed(tensor: Tensor, quantised: bool) -> bool:
    """Whether a tensor holds a quantisation's integers.

    Nothing trains these, and bitsandbytes' CPU kernels repack them in the first forward pass: the object stands for
    them.
    """
    return quantised and not tensor.is_floating_point()


def _sources(model: PreTrainedModel, weights: Mapping[str, Tensor], quantised: bool) -> dict[str, str]:
    """Where each weight's bytes come from, as text; what is not known yet is hashed."""
    sources: dict[str, str] = {}
    unknown: dict[str, Tensor] = {}
    # Asked only where something waits elsewhere: it is a walk over all modules. While a block is held its weights are
    # in memory, and are still those of the files, or of a repair.
    waiting = any(tensor.is_meta for tensor in weights.values())
    offloaded, others = (_offloaded(model), replacements(model)) if waiting else ({}, {})
    for name, tensor in weights.items():
        if name in others:
            sources[name] = _hash_bytes(others[name].to(tensor.dtype))
            continue
        if name in offloaded or tensor.is_meta:
            sources[name] = _require_stored(model, name, offloaded.get(name))
            continue
        source = _recall(tensor, _is_packed(tensor, quantised))
        text = _told(source) if isinstance(source, _Stored) else source
        if text is None:
            unknown[name] = tensor
        else:
            sources[name] = text
    # Tied weights share their storage and are hashed once.
    once = {_layout(tensor): tensor for tensor in unknown.values()}
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(once, pool.map(_hash_bytes, once.values()), strict=True))
    for name, tensor in unknown.items():
        sources[name] = hashes[_layout(tensor)]
        _remember(tensor, _is_packed(tensor, quantised), sources[name])
    return sources


def _told(stored: _Stored) -> str | None:
    identity = stored.files.identity()
    return None if identity is None else f"{identity} {stored.name}"


def _require_stored(model: PreTrainedModel, name: str, stored_name: str | None) -> str:
    files = _FILES.get(model)
    if files is None or stored_name is None:
        raise CheckpointError(
            f"{name} has no data in memory (it is on the meta device), and it is not known from which files it would "
            f"come, so this model cannot be told from others; load it with excise.models.loading.load"
        )
    if (text := _told(_Stored(files, stored_name))) is None:
        raise CheckpointError(
            f"{name} is offloaded, and the files it was loaded from have changed since; load the model again"
        )
    return text


def _offloaded(model: PreTrainedModel) -> dict[str, str]:
    """Weights that accelerate's hooks bring in for each forward pass: name → name under which the hook finds them."""
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            prefix = getattr(getattr(each, "weights_map", None), "prefix", None)
            if prefix is not None:
                # Hooks further down come later and know better.
                local = _weights(module)
                found |= {f"{path}.{name}" if path else name: f"{prefix}{name}" for name in local}
    return found


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *place, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _recall(tensor: Tensor, packed: bool) -> _Source | None:
    states = _SEEN.get(tensor, ())
    if packed:
        return states[-1].source if states else None
    layout, version = _layout(tensor), _version(tensor)
    for state in states:
        if state.layout == layout and state.version == version and state.sample == _sample(tensor):
            return state.source
    return None


def _remember(tensor: Tensor, packed: bool, source: _Source) -> None:
    layout, version = _layout(tensor), _version(tensor)
    # Other storages that are still alive may be put back; a version that has passed cannot.
    alive = [
        s for s in _SEEN.get(tensor, ()) if s.version == version and s.layout != layout and not s.storage.expired()
    ]
    sample = b"" if packed else _sample(tensor)
    _SEEN[tensor] = [*alive, _Seen(layout, version, sample, StorageWeakRef(tensor.untyped_storage()), source)]


def _version(tensor: Tensor) -> object:
    # Inference tensors count nothing: never the same.
    return object() if tensor.is_inference() else tensor._version


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    each = max(1, round(SAMPLED ** (1 / max(1, tensor.dim()))))
    part = tensor.detach()[tuple(slice(None, None, max(1, size // each)) for size in tensor.shape)]
    return bytes(_bytes_of(part))


@torch.no_grad()
def _hash_bytes(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    step = max(1, CHUNK_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        digest.update(_bytes_of(flat[start : start + step]))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def _stable(config: PretrainedConfig) -> Any:
    """A config as plain data, without what says where it came from and who wrote it."""
    if isinstance(config, Mapping):
        return {str(key): _stable(value) for key, value in config.items() if key not in UNSTABLE}
    return [_stable(value) for value in config] if isinstance(config, list | tuple) else config


def _own_code(model: PreTrainedModel) -> bytes:
    """Hash of the Python files of a model that came with code of its own; empty for transformers' own models."""
    if not type(model).__module__.startswith("transformers_modules."):
        return b""
    digest = hashlib.sha256()
    for path in sorted(Path(inspect.getfile(type(model))).parent.glob("*.py")):
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.digest()
