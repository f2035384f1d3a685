"""Kill every verb at its file events, start the same command again, and compare with a run that nobody disturbed.

python -m tests.faults.kills --n 50 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.verbs import Verb, attempt, contents, litter, verbs

# Python tells of these; what safetensors writes lies between the renames of it.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}


def is_change(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    """Whether what an audit hook was told of changes a file in a folder."""
    if event not in EVENTS or not str(arguments[0]).startswith(str(folder)):
        return False
    return event != "open" or (isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))


def at_event(number: int, folder: Path, told: Path, sent: signal.Signals) -> Callable[[], None]:
    """A fault that sends this process a signal at its `number`-th change in a folder; 0 only counts them, in `told`."""
    seen = 0

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not is_change(event, arguments, folder):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), sent)
        elif number == 0:
            os.write(counter, b".")

    counter = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if number == 0 else -1
    return lambda: sys.addaudithook(listen)


def undisturbed(verb: Verb, folder: Path) -> tuple[dict[str, Any], int]:
    """Result of a command that nobody disturbs, and how many file events it has."""
    folder.mkdir(parents=True)
    told = folder.parent / f"{folder.name}.events"
    command = (*verb.arguments, "--out", folder / verb.out)
    status = attempt(command, folder / "log", at_event(0, folder, told, signal.SIGKILL))
    if status:
        raise RuntimeError(f"{verb.name} exits with {status}: {(folder / 'log').read_text()[-2000:]}")
    return contents(folder / verb.out), told.stat().st_size


def disturbed(verb: Verb, folder: Path, event: int, sent: signal.Signals, expected: dict[str, Any]) -> str:
    """Kill a command at one event and start it again; returns what is wrong, empty where nothing is."""
    folder.mkdir(parents=True)
    command = (*verb.arguments, "--out", folder / verb.out)
    first = attempt(command, folder / "log", at_event(event, folder, folder / "events", sent))
    if first not in (SIGNALS[sent.name], 0):
        return f"event {event}: exits with {first} when it gets {sent.name}: {_last(folder)}"
    again = attempt(command, folder / "log")
    if again:
        return f"event {event}: started again, it exits with {again}: {_last(folder)}"
    found = contents(folder / verb.out)
    if found != expected:
        names = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        return f"event {event}: another result in {sorted(names)}"
    left = litter(folder, verb.out)
    if left:
        return f"event {event}: left {left}"
    said = (folder / "log").read_text(encoding="utf-8")
    return f"event {event}: a traceback: {said[-2000:]}" if "Traceback" in said else ""


def _last(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")[-1000:]


def campaign(names: set[str], kills: int, seed: int, sent: signal.Signals, place: Path) -> dict[str, Any]:
    """Figures of each verb: kills, how many ended well, and what was wrong with the others."""
    figures = {}
    for verb in verbs(place / "inputs"):
        if names and verb.name not in names:
            continue
        started = time.perf_counter()
        expected, events = undisturbed(verb, place / verb.name / "undisturbed")
        numbers = sorted(random.Random(f"{seed} {verb.name}").sample(range(1, events + 1), min(kills, events)))
        wrong = []
        for number in numbers:
            folder = place / verb.name / str(number)
            if fault := disturbed(verb, folder, number, sent, expected):
                wrong.append(fault)
                print(f"{verb.name}: {fault}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.perf_counter() - started)
        well = len(numbers) - len(wrong)
        figures[verb.name] = {"events": events, "kills": len(numbers), "well": well, "wrong": wrong, "seconds": seconds}
        print(f"{verb.name}: {well} of {len(numbers)} in {seconds} s", file=sys.stderr)
    return figures


def main() -> None:
    """Parse the command line and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50, help="kills per verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=sorted(SIGNALS), default="SIGKILL")
    parser.add_argument("--verb", action="append", default=[], help="only this one; repeatable")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["EXCISE_CACHE"] = str(Path(place) / "cache")
        figures = campaign(
            set(arguments.verb), arguments.n, arguments.seed, signal.Signals[arguments.signal], Path(place)
        )
    print(json.dumps({"signal": arguments.signal, "seed": arguments.seed, "verbs": figures}, indent=1))


if __name__ == "__main__":
    main()
