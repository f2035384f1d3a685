"""Weights that wait on disk: a block's are brought to the device while work is done with it, and let go after.

Reading them, from the checkpoint's own files where those hold them as they are needed, is accelerate's; so are fused
and quantised weights, which transformers writes anew where the files hold others. What is added here is for how long: a
pass over samples holds a block for all of its batches, so that its weights are read once and not once per batch.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLACED: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()


@contextlib.contextmanager
def offload_folder() -> Iterator[tuple[str, Callable[[object], None]]]:
    """A folder for weights that the checkpoint holds in another form than the model.

    Yields:
        The folder, and what ties its life to that of a model; a folder that is tied to none goes at once.

    """
    folder = tempfile.mkdtemp(prefix="excise-offload-")
    tied = False

    def tie(model: object) -> None:
        nonlocal tied
        tied = True
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)

    try:
        yield folder, tie
    finally:
        if not tied:
            shutil.rmtree(folder, ignore_errors=True)


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights of a module wait elsewhere until it runs."""
    return any(True for _ in _waiting(module))


def hold_when_called(blocks: Sequence[nn.Module]) -> None:
    """Make every block hold all its weights while it runs, also those that no module of its own is called for.

    Accelerate brings weights in module by module, as each is called; a state-space sublayer or fused experts read
    weights of modules that they never call.
    """
    for block in blocks:
        if is_offloaded(block):
            block.forward = _holding(block, block.forward)


def _holding(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with held(block):
            return forward(*args, **kwargs)

    return call


@contextlib.contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Context in which all weights of a module are on the device on which it runs; nothing, where they are anyway."""
    hooks = list(_waiting(module))
    brought = []
    try:
        for owner, hook in hooks:
            hook.pre_forward(owner)
            # Until it is let go, calls of the module find its weights there.
            hook.offload = False
            brought.append((owner, hook))
        yield
    finally:
        for owner, hook in brought:
            hook.offload = True
            hook.post_forward(owner, None)


@contextlib.contextmanager
def replaced(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which offloaded weights, by name, are other ones whenever their block is held."""
    stores = [(*_store_of(model, name), tensor) for name, tensor in weights.items()]
    earlier = [(store, key, store[key]) for store, key, _ in stores if key in store]
    before = _REPLACED.get(model, {})
    try:
        for store, key, tensor in stores:
            store[key] = tensor
        _REPLACED[model] = {**before, **weights}
        yield
    finally:
        _REPLACED[model] = before
        for store, key, _ in stores:
            del store[key]
        for store, key, tensor in earlier:
            store[key] = tensor


def waits(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight, by name, waits on disk whenever its block is not held."""
    return bool(_maps(model.get_submodule(name.rpartition(".")[0]), deep=False))


def replacements(model: PreTrainedModel) -> dict[str, Tensor]:
    """Offloaded weights that are other ones for now, by name."""
    return dict(_REPLACED.get(model, {}))


def _store_of(model: PreTrainedModel, name: str) -> tuple[dict[str, Tensor], str]:
    """Where the hook that brings a weight in looks first, and under which name."""
    path, _, own = name.rpartition(".")
    (hook,) = _maps(model.get_submodule(path), deep=False)
    found = hook.weights_map.dataset
    # Of what is on disk, accelerate's reader has a dictionary that goes before the files; else it is the dictionary.
    store: dict[str, Tensor] = getattr(found, "state_dict", found)
    return store, f"{hook.weights_map.prefix}{own}"


def _maps(module: nn.Module, *, deep: bool = True) -> list[Any]:
    """Hooks that bring weights in."""
    owners = module.modules() if deep else (module,)
    return [hook for owner in owners for hook in _hooks(owner) if getattr(hook, "weights_map", None) is not None]


def _waiting(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for owner in module.modules():
        for hook in _hooks(owner):
            if getattr(hook, "offload", False):
                yield owner, hook


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Accelerate's hooks of one module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
