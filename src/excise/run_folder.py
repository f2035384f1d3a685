"""The folder of a run: `run.json` says that it is finished, `work` that it is a run, finished or not."""

from __future__ import annotations

import shutil
from pathlib import Path

from excise.artefacts import read_json
from excise.errors import OutputError
from excise.healing import heal_stage

MANIFEST = "run.json"
WORK = "work"


def check_folder(out: str | Path, force: bool) -> Path:
    """Refuse a folder that a run must not write to; touches nothing.

    Raises:
        OutputError: it holds a finished run, or something that is no run at all.

    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose another --out")
    if (folder / MANIFEST).exists() and not force:
        raise OutputError(f"{folder} holds a finished run; choose another --out, or pass --force to replace it")
    if folder.exists() and any(folder.iterdir()) and not (folder / WORK).exists():
        raise OutputError(f"{folder} exists and is no run of excise; choose another --out")
    return folder


def open_folder(out: str | Path, force: bool) -> Path:
    """Create the folder of a run, or take up an unfinished one; a finished one starts anew."""
    folder = check_folder(out, force)
    if (folder / MANIFEST).exists():
        if read_json(folder / MANIFEST).get("healed"):
            shutil.rmtree(folder / heal_stage.FOLDER, ignore_errors=True)
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder / WORK, ignore_errors=True)
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    return folder
