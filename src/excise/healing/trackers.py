"""Trackers that get a training's curve: whatever transformers can report to, each set up by its own variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from excise.errors import InputError, MissingExtraError
from excise.team import launched

# The only way transformers 5 takes the folder.
FOLDER = "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True)
class Tracking:
    """Which trackers get the curve.

    Attributes:
        names: of transformers' integrations.
        folder: for TensorBoard's event files, where its variable names none.

    Raises:
        InputError: an unknown name.
        MissingExtraError: a tracker's package is not installed.

    """

    names: tuple[str, ...] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in INTEGRATION_TO_CALLBACK:
                raise InputError(f"expected trackers among {', '.join(INTEGRATION_TO_CALLBACK)}, got '{name}'")
            try:
                # As the trainer will, after hours of other work.
                INTEGRATION_TO_CALLBACK[name]()
            # Each says in its own way what to install.
            except (RuntimeError, ImportError) as error:
                raise MissingExtraError(f"reporting to {name} needs its package: {error}") from error

    def opened(self) -> list[str]:
        """What the trainer is to report to: of several processes, the first does.

        The others have the same curve, and not every tracker asks which process it is in.
        """
        if launched()[0] > 0:
            return []
        if "tensorboard" in self.names and self.folder is not None:
            os.environ.setdefault(FOLDER, str(self.folder))
        return list(self.names)
