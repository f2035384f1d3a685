"""The journal of a long stage: one small file a batch, so that an interrupted stage goes on where it stopped.

Several processes may share one journal, each doing its slice of the batches; whoever finds it complete joins the rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from excise.artefacts import atomic_path, read_json, write_json
from excise.errors import OutputError


class Journal:
    """Results of batches on disk, keyed by what determines them.

    Args:
        folder: where the files go; None keeps everything in memory.
        key: everything the results depend on (model hash, sample hash, settings). A folder with another key is refused.

    Raises:
        OutputError: the folder holds another run's results.

    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self._memory: dict[int, dict[str, np.ndarray]] = {}
        if folder is None:
            return
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        key_file = folder / "key.json"
        if key_file.exists() and read_json(key_file).get("sha256") != digest:
            raise OutputError(
                f"{folder} holds an unfinished run with other settings, another model or other data; "
                f"delete it, or choose another --out"
            )
        if not key_file.exists():
            write_json(key_file, {"sha256": digest, "key": key})

    def __contains__(self, batch: int) -> bool:
        return batch in self._memory or (self.folder is not None and self._file(batch).exists())

    def write(self, batch: int, **arrays: np.ndarray) -> None:
        """Keep the results of one batch."""
        if self.folder is None:
            self._memory[batch] = arrays
            return
        with atomic_path(self._file(batch)) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)

    def read(self, batch: int) -> dict[str, np.ndarray]:
        """Results of one batch, as they were written."""
        if self.folder is None:
            return self._memory[batch]
        try:
            return load_file(self._file(batch))
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{self._file(batch)} is damaged ({error}); delete it and run again") from None

    def delete(self) -> None:
        """Forget everything, once the joined result is kept elsewhere."""
        self._memory.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, batch: int) -> Path:
        assert self.folder is not None
        return self.folder / f"batch-{batch:06d}.safetensors"
