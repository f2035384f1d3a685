"""The hub's cache with a model in it, and no connection."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(folder: Path, name: str, cache: Path, monkeypatch) -> Path:
    """Lay a checkpoint folder into a hub cache as a download does; returns the snapshot's folder.

    Args:
        folder: the checkpoint.
        name: of the repository, such as "org/name".
        cache: folder of the cache.
        monkeypatch: pytest's, which makes the cache the hub's for the test.

    """
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    blobs = place / "blobs"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder)
        blob = blobs / "-".join(inside.parts)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        (snapshot / inside).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / inside).symlink_to(blob)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot
