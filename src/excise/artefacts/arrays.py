"""Arrays and tensors as sealed safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.artefacts.atomic import atomic_path
from excise.artefacts.seal import MADE_BY, blank, facts_of, stamp
from excise.errors import InputError
from excise.plain import Facts, Values

if TYPE_CHECKING:
    import numpy as np

Arrays = dict[str, "np.ndarray"]


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, Any],
    facts: Values | None = None,
    *,
    key: str | None = None,
    durable: bool = True,
) -> None:
    """Write NumPy arrays, or PyTorch tensors, with facts as metadata; atomically.

    Args:
        path: the file.
        arrays: all of one kind.
        facts: plain data.
        key: of what made them.
        durable: see `atomic_path`.

    """
    metadata = blank({**(facts or {}), **({} if key is None else {MADE_BY: key})})
    with atomic_path(path, durable=durable) as temporary:
        if any(hasattr(array, "detach") for array in arrays.values()):
            from safetensors.torch import save_file as save_tensors

            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
            save_tensors(whole, temporary, metadata=metadata)
        else:
            import numpy as np
            from safetensors.numpy import save_file as save_arrays

            whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
            save_arrays(whole, temporary, metadata=metadata)
        stamp(temporary)


def read_arrays(path: str | Path, framework: str = "np") -> tuple[dict[str, Any], Facts]:
    """Arrays of a file and its facts.

    Args:
        path: the file.
        framework: np for NumPy arrays, pt for PyTorch tensors.

    Raises:
        InputError: no such file, no safetensors file, not what was sealed, or a newer excise sealed it.

    """
    from safetensors import SafetensorError, safe_open

    facts = facts_of(path)
    try:
        with safe_open(path, framework=framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or no safetensors file ({error})") from None
