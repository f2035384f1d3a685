"""Optional packages: imported when first used, with an error that names the install command."""

from __future__ import annotations

import importlib
from typing import Any

from excise.errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: Name of the module.
        extra: The extra of excise that installs it.

    Raises:
        MissingExtraError: it is not installed.

    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs the package {error.name}, which is not installed; run: pip install 'excise[{extra}]'"
        ) from None
