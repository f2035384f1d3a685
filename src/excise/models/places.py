"""Where a user wants the weights of a model: as far as the memory of each device goes, or by a map of his own.

The maps are those of transformers' and accelerate's `device_map`. What stands outside the blocks (embedding, norms,
head) is used by every pass and stays on one device or in memory; blocks may wait, in the machine's memory beside a GPU
or on the disk, and come to the device when they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from excise.artefacts import read_json
from excise.errors import InputError
from excise.plain import Plain
from excise.text import human_bytes

CPU, DISK = "cpu", "disk"
Place = int | str


def streamed_map(model: nn.Module, stack: str, device: str) -> dict[str, Place]:
    """Device map of a model whose blocks wait on disk, and whose embedding, norms and head do not.

    Args:
        model: on the meta device, as a skeleton.
        stack: path of the list of blocks inside it.
        device: of everything else, and of every block while it runs.

    """
    blocks = [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()]
    # Everything by name: with a default beside what waits, accelerate takes the whole model for one module.
    return {**dict.fromkeys(_others(model, stack), device), **dict.fromkeys(blocks, DISK)}


def limited_map(model: nn.Module, stack: str, dtype: torch.dtype, limits: Mapping[str, int]) -> dict[str, Place]:
    """Device map that fills the devices in turn, GPUs first, then the machine's memory, then the disk.

    Args:
        model: on the meta device, as a skeleton.
        stack: path of the list of blocks inside it.
        dtype: of the computation.
        limits: bytes of weights by device, a GPU's number or "cpu"; at least one.

    Raises:
        InputError: a GPU that is not there, or what is no block does not fit on the first device.

    """
    order = sorted((_device(name, "--max-memory") for name in limits), key=lambda place: (place == CPU, str(place)))
    left = {place: float(limits[str(place)]) for place in order}
    first = order[0]
    left[first] -= _bytes(model, dtype) - _bytes(model.get_submodule(stack), dtype)
    if left[first] < 0:
        raise InputError(
            f"embedding, norms and head take {human_bytes(int(limits[str(first)] - left[first]))} and must stay on "
            f"{first}, of which --max-memory allows {human_bytes(limits[str(first)])}"
        )
    places: dict[str, Place] = dict.fromkeys(_others(model, stack), first)
    for name, block in model.get_submodule(stack).named_children():
        needed = _bytes(block, dtype)
        # Never back to an earlier device: a pass then crosses from one to the next once.
        while order and left[order[0]] < needed:
            order.pop(0)
        places[f"{stack}.{name}"] = order[0] if order else DISK
        if order:
            left[order[0]] -= needed
    return places


def own_map(model: nn.Module, stack: str, path: Path) -> dict[str, Place]:
    """A user's device map.

    Args:
        model: on the meta device, as a skeleton.
        stack: path of the list of blocks inside it.
        path: JSON, an object from names of modules to a GPU's number, "cpu" or "disk".

    Raises:
        InputError: no such file, no such map, a device that is not there; names that the model does not have, that
            overlap, or that leave weights out; embedding, norms or head that would wait for their turn.

    """
    given = read_json(path)
    if not isinstance(given, dict) or not given:
        raise InputError(f'expected {path} to map modules to devices, such as {{"model.embed_tokens": 0, …}}')
    places = {name: DISK if device == DISK else _device(device, str(path)) for name, device in given.items()}
    weights = list(model.state_dict())
    for name in places:
        below = [other for other in places if other != name and _within(other, name)]
        if not any(_within(weight, name) for weight in weights):
            raise InputError(f"{path} places '{name}', which holds no weights of this {type(model).__name__}")
        if below:
            raise InputError(f"{path} places '{below[0]}' by itself and in '{name}'; name each weight once")
    placed = {weight: next((places[n] for n in places if _within(weight, n)), None) for weight in weights}
    if missing := [weight for weight, place in placed.items() if place is None]:
        raise InputError(f"{path} leaves out {len(missing)} weights (first: {missing[0]})")
    waiting = waiting_places(places)
    for weight, place in placed.items():
        if place in waiting and not _within(weight, stack):
            raise InputError(
                f"{path} lets {weight} wait on '{place}'; only blocks ({stack}.…) may, as every pass needs the others"
            )
    return places


def waiting_places(places: Mapping[str, Place]) -> set[Place]:
    """Where, of a device map, weights are not computed with: the disk, and the machine's memory beside a GPU."""
    on_gpu = any(place not in (CPU, DISK) for place in places.values())
    return {DISK, CPU} if on_gpu else {DISK}


def _device(named: Plain, where: str) -> Place:
    """A GPU's number or "cpu", if it is there."""
    text = str(named).removeprefix("cuda:")
    if text == CPU:
        return CPU
    if isinstance(named, bool) or not text.isdecimal():
        raise InputError(f"{where}: expected a GPU's number, cpu or disk, got {named!r}")
    if int(text) >= torch.cuda.device_count():
        raise InputError(f"{where}: there is no GPU {text}; torch sees {torch.cuda.device_count()} here")
    return int(text)


def _others(model: nn.Module, stack: str) -> Iterator[str]:
    """Names of what is no block, modules or parameters, none inside another."""
    module, path = model, ""
    for step in stack.split("."):
        yield from (f"{path}{name}" for name, _ in module.named_children() if name != step)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        yield from (f"{path}{name}" for name, _ in own)
        module, path = module.get_submodule(step), f"{path}{step}."


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of its weights, each counted once, floating-point ones in a dtype."""
    return sum(p.numel() * (dtype.itemsize if p.is_floating_point() else p.element_size()) for p in module.parameters())


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")
