"""Run every verb on file systems that are too small, and see that each ends with one line and leaves nothing half.

    python -m tests.faults.full_disk --n 12

Needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.faults.kills import undisturbed
from tests.faults.verbs import Verb, attempt, contents, verbs


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes.

    Raises:
        PermissionError: this user may not mount.

    """
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        raise PermissionError(done.stderr.decode().strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def filled(verb: Verb, place: Path, size: int, expected: dict[str, Any]) -> str:
    """Run a command on a disk of so many bytes, then with room; returns what is wrong."""
    log = place.parent / "log"
    log.write_text("")
    with small_disk(place, size):
        command = (*verb.arguments, "--out", place / verb.out)
        status = attempt(command, log)
        said = log.read_text(encoding="utf-8")
        if status not in (0, 2):
            return f"{size} bytes: exits with {status}: {said[-1500:]}"
        if "Traceback" in said:
            return f"{size} bytes: a traceback: {said[-1500:]}"
        if status == 2 and "no space left" not in said and "are free there" not in said:
            return f"{size} bytes: does not say why: {said[-300:]}"
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        again = attempt(command, log)
        if again:
            return f"{size} bytes: with room, it exits with {again}: {log.read_text()[-1500:]}"
        found = contents(place / verb.out)
    return "" if found == expected else f"{size} bytes: with room, another result"


def campaign(names: set[str], disks: int, place: Path) -> dict[str, Any]:
    """Figures of each verb on so many sizes, from a few blocks to what it needs."""
    figures = {}
    for verb in verbs(place / "inputs"):
        if names and verb.name not in names:
            continue
        folder = place / verb.name / "undisturbed"
        expected, _ = undisturbed(verb, folder)
        needed = sum(max(4096, path.stat().st_size) for path in folder.rglob("*") if path.is_file())
        sizes = [4096 * max(1, round(needed * (number + 1) / disks / 4096)) for number in range(disks)]
        wrong = []
        for size in sizes:
            disk = place / verb.name / "disk"
            if fault := filled(verb, disk, size, expected):
                wrong.append(fault)
                print(f"{verb.name}: {fault}", file=sys.stderr)
        figures[verb.name] = {"needed": needed, "disks": disks, "well": disks - len(wrong), "wrong": wrong}
        print(f"{verb.name}: {disks - len(wrong)} of {disks}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def main() -> None:
    """Parse the command line and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=12, help="disks per verb")
    parser.add_argument("--verb", action="append", default=[], help="only this one; repeatable")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["EXCISE_CACHE"] = str(Path(place) / "cache")
        figures = campaign(set(arguments.verb), arguments.n, Path(place))
    print(json.dumps({"verbs": figures}, indent=1))


if __name__ == "__main__":
    main()
