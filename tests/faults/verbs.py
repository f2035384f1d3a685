"""What the campaigns run: every verb that takes long on a tiny model, in forked processes that share their imports."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from excise.__main__ import main
from excise.surgery import check, self_test
from tests.fresh import in_this_process
from tests.tiny import tiny_folder

DATA = ("--samples", 6, "--tokens", 24, "--batch-tokens", 48)
# Times, machines and commands differ from one process to the next; so do the names of temporary folders.
VOLATILE = {"seconds", "provenance", "time", "command", "self_test", "versions", "seal", "made_by", "job", "curve"}
VOLATILE |= {"elapsed", "tokens_per_second", "criterion_seconds"}


@dataclass(frozen=True)
class Verb:
    """A command on tiny inputs.

    Attributes:
        name: of the verb, with what makes it special.
        arguments: of the command line, without `--out`.
        out: what it writes, inside the folder of an attempt.

    """

    name: str
    arguments: tuple[Any, ...]
    out: str


def verbs(inputs: Path) -> tuple[Verb, ...]:
    """All of them, on inputs that are written to a folder."""
    model, pruned, text = inputs / "model", inputs / "pruned", inputs / "text.txt"
    if not model.exists():
        tiny_folder(model, layers=6)
        text.write_text("A stack of blocks loses a few of them and still speaks.\n" * 40, encoding="utf-8")
        attempt(("prune", model, "--removed", "2,4", "--out", pruned), inputs / "prune.log")
    run = ("run", model, "--remove", 2, "--held-out", 4, "--effort", 1, *DATA)
    small = ("--samples", 8, "--tokens", 24, "--steps", 4, "--batch", 2)
    heal = ("--heal-samples", 8, "--heal-tokens", 24, "--heal-steps", 4, "--heal-batch", 2)
    compare = ("compare", model, "--remove", 2, "--methods", "fisher,block-influence", "--eval-samples", 4, *DATA)
    evaluate = ("evaluate", pruned, "--perplexity", text, "--window", 24, "--limit", 4, "--no-card")
    return (
        Verb("run", run, "out"),
        Verb("run --heal", (*run, "--heal", *heal), "out"),
        Verb("heal", ("heal", pruned, "--teacher", model, *small), "out"),
        Verb("prune", ("prune", model, "--removed", "1,3"), "out"),
        Verb("compare", compare, "out"),
        Verb("refine", ("refine", model, "--remove", 2, "--effort", 1, *DATA), "out"),
        Verb("score", ("score", model, *DATA), "out.safetensors"),
        Verb("evaluate", evaluate, "scores.json"),
    )


def attempt(
    arguments: Sequence[Any], log: Path, fault: Callable[[], None] = lambda: None, seconds: float = 300.0
) -> int:
    """Run `excise ARGUMENTS…` in a forked process.

    Args:
        arguments: of the command line.
        log: file for everything it says.
        fault: called in that process before it begins.
        seconds: after which it is taken to hang.

    Returns:
        Its exit status; minus the number of the signal that ended it.

    Raises:
        TimeoutError: it hangs; it is killed.

    """
    child = os.fork()
    if child == 0:
        os._exit(in_child([str(argument) for argument in arguments], log, fault))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError(f"{arguments} took more than {seconds:.0f} s")


def in_child(arguments: list[str], log: Path, fault: Callable[[], None]) -> int:
    """In a forked process: run `excise ARGUMENTS…`, say everything in a file, and return the exit status."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.argv = ["excise", *arguments]
    # Where the attempt is: some files go to the working directory.
    os.chdir(log.parent)
    self_test.in_fresh_process = check.in_fresh_process = in_this_process
    try:
        fault()
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def contents(place: Path) -> dict[str, Any]:
    """What results are compared by: every file of a result, without what changes from one process to the next."""
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    named = {str(file.relative_to(place.parent)): file for file in files}
    return {name: _content(file, place.parent) for name, file in named.items() if "work" not in Path(name).parts}


def litter(folder: Path, out: str) -> list[str]:
    """What a command should not have left in the folder where it wrote `out`."""
    hidden = folder.rglob(".*")
    found = [file for file in hidden if file.name.startswith(f".{out}") or file.suffix in (".partial", ".lock")]
    return [str(file.relative_to(folder)) for file in found]


def _content(file: Path, folder: Path) -> Any:
    if file.suffix == ".json":
        # The folder of the attempt is named in them.
        return _stable(json.loads(file.read_text(encoding="utf-8").replace(str(folder), "…")))
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {name: _bytes(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    if file.suffix in (".md", ".html"):
        # They hold times and the command.
        return None
    return file.read_bytes()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(entry) for name, entry in value.items() if name not in VOLATILE}
    return [_stable(entry) for entry in value] if isinstance(value, list) else value
