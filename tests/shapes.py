"""Shapes of tensors and arrays are checked while testing, wherever a signature or a dataclass of excise gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

# All that signatures with shapes stand in; not the solvers, whose kernels Numba compiles and caches as they are.
STAGES = [f"excise.{stage}" for stage in ("choosing", "data", "healing", "measuring", "models", "repair", "surgery")]
STAGES += [f"excise.ising.{part}" for part in ("energies", "gradients", "problem", "spectrum", "units")]
SHAPED = ('Tensor, "', 'ndarray, "')


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have beartype check a function's arguments and result, if its annotations give a shape.

    The others are mypy's: at run time beartype would want every name that is imported for annotations alone.
    """
    annotations = str(inspect.get_annotations(function))
    return beartype(function) if any(shape in annotations for shape in SHAPED) else function
