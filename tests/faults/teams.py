"""Every verb that divides its work, by several processes: the same result as by one, also after a kill in any stage.

python -m tests.faults.teams --n 1 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.faults.kills import undisturbed
from tests.faults.moments import counted, killed_at
from tests.faults.verbs import DATA, Verb, contents, in_child, litter, verbs

SIZES = (2, 3)
# A training adds gradients in an order that depends on who has them, so its weights are compared by name; its batch is
# of two samples.
TRAINS, SIZES_OF = ("run --heal",), {"run --heal": (2,)}
SECONDS = 300.0
# torchrun ends the others as soon as it sees that one is gone.
LOOKS_EVERY = 0.05
UNDIVIDED = ("evaluate", "heal", "prune")


def divided(inputs: Path) -> list[Verb]:
    """Verbs whose passes are divided."""
    found = [verb for verb in verbs(inputs) if verb.name not in UNDIVIDED]
    model = inputs / "model"
    repair = ("prune", model, "--removed", "1,3", "--repair", "--samples", 6, "--tokens", 24, "--held-out", 4)
    verify = ("verify", model, "--removed", "1,3", "--removed", "2,4", *DATA)
    return [*found, Verb("prune --repair", repair, "out"), Verb("verify", verify, "verified.json")]


def launched(
    arguments: Sequence[Any], folder: Path, size: int, faults: dict[int, Callable[[], None]] | None = None
) -> list[int]:
    """Run a command by several forked processes, as `torchrun` would; returns their exit statuses, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            of_job = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            of_job |= {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in of_job.items()})
            status = 70
            try:
                fault = (faults or {}).get(rank, lambda: None)
                status = in_child([str(argument) for argument in arguments], folder / f"log-{rank}", fault)
            finally:
                # Whatever is raised last: this is a copy of the campaign, and must not go on as one.
                os._exit(status)
        children.append(child)
    return _waited(children)


def _waited(children: Sequence[int]) -> list[int]:
    statuses: dict[int, int] = {}
    until = time.monotonic() + SECONDS
    while len(statuses) < len(children):
        time.sleep(LOOKS_EVERY)
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > until
        if late or any(statuses.values()):
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL if late else signal.SIGTERM)
            until = min(until, time.monotonic() + 5.0)
    return [statuses[child] for child in children]


def wrong_result(
    verb: Verb, folder: Path, size: int, expected: dict[str, Any], faults: dict[int, Callable[[], None]] | None = None
) -> str:
    """Run a command to its end by so many processes; returns what is wrong, empty where nothing is."""
    folder.mkdir(parents=True, exist_ok=True)
    statuses = launched((*verb.arguments, "--out", folder / verb.out), folder, size, faults)
    said = "".join((folder / f"log-{rank}").read_text(encoding="utf-8") for rank in range(size))
    if any(statuses):
        return f"{size} processes exit with {statuses}: {said[-1500:]}"
    found = contents(folder / verb.out)
    if verb.name in TRAINS and found.keys() == expected.keys():
        found = expected
    if found != expected:
        names = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        return f"{size} processes: another result in {sorted(names)}"
    if left := litter(folder, verb.out):
        return f"{size} processes left {left}"
    return f"{size} processes: a traceback: {said[-1500:]}" if "Traceback" in said else ""


@dataclass(frozen=True)
class Moments:
    """Of one process among several, how many moments it has in a stage."""

    size: int
    rank: int
    count: int


def by_stage(verb: Verb, folder: Path, size: int, expected: dict[str, Any]) -> tuple[str, dict[str, list[Moments]]]:
    """Run a command by so many processes, undisturbed: what is wrong, and the moments of each process by stage."""
    told = [folder.parent / f"moments-{size}-{rank}" for rank in range(size)]
    folder.mkdir(parents=True)
    wrong = wrong_result(verb, folder, size, expected, {r: counted(folder, file) for r, file in enumerate(told)})
    stages: dict[str, list[Moments]] = {}
    for rank, file in enumerate(told):
        for stage, count in Counter(file.read_text(encoding="utf-8").splitlines()).items():
            stages.setdefault(stage, []).append(Moments(size, rank, count))
    return wrong, stages


def killed(verb: Verb, folder: Path, stage: str, at: Moments, then: int, expected: dict[str, Any]) -> str:
    """Kill one process at moment `at.count` of a stage, then start the command again by another number of them."""
    folder.mkdir(parents=True)
    command = (*verb.arguments, "--out", folder / verb.out)
    statuses = launched(command, folder, at.size, {at.rank: killed_at(folder, stage, at.count)})
    where = f"{stage}: process {at.rank} of {at.size}, moment {at.count}"
    if statuses[at.rank] != -signal.SIGKILL and at.count > 1:
        # Who writes what the store lacks is a matter of time; every process enters the stage.
        shutil.rmtree(folder)
        return killed(verb, folder, stage, replace(at, count=1), then, expected)
    if statuses[at.rank] != -signal.SIGKILL:
        return f"{where}: it never came there, and exits with {statuses[at.rank]}"
    for log in folder.glob("log-*"):
        log.unlink()
    wrong = wrong_result(verb, folder, then, expected)
    return f"{where}, then {wrong}" if wrong else ""


def campaign(names: set[str], only: set[str], kills: int, seed: int, place: Path) -> dict[str, Any]:
    """Figures of each verb: how many kills in each of its stages, and what was wrong."""
    figures = {}
    for verb in divided(place / "inputs"):
        if names and verb.name not in names:
            continue
        expected, _ = undisturbed(verb, place / verb.name / "one")
        sizes, wrong, stages = SIZES_OF.get(verb.name, SIZES), [], {}
        for size in sizes:
            found, moments = by_stage(verb, place / verb.name / str(size), size, expected)
            wrong.append(found)
            for stage, of_stage in moments.items():
                stages.setdefault(stage, []).extend(of_stage)
        draw, done = random.Random(f"{seed} {verb.name}"), {}
        for stage in (stage for stage in stages if not only or stage in only):
            for _ in range(kills):
                at = draw.choice(stages[stage])
                at = replace(at, count=draw.randint(1, at.count))
                then = draw.choice([size for size in (1, *sizes) if size != at.size])
                wrong.append(killed(verb, place / verb.name / "kill", stage, at, then, expected))
                shutil.rmtree(place / verb.name / "kill", ignore_errors=True)
                print(f"{verb.name}: {stage}: {wrong[-1] or 'well'}", file=sys.stderr, flush=True)
            done[stage] = kills
        figures[verb.name] = {"sizes": list(sizes), "kills": done, "wrong": [reason for reason in wrong if reason]}
        print(f"{verb.name}: {figures[verb.name]}", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Parse the command line and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1, help="kills in each stage of a verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--stage", action="append", default=[], help="kills in this one only; repeatable")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["EXCISE_CACHE"] = str(Path(place) / "cache")
        figures = campaign(set(arguments.verb), set(arguments.stage), arguments.n, arguments.seed, Path(place))
    print(json.dumps({"seed": arguments.seed, "verbs": figures}, indent=1))


if __name__ == "__main__":
    main()
