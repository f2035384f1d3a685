"""Give every verb files that are wrong in every way, and see that each ends in one line, soon, and in little memory.

python -m tests.faults.fuzz --n 1000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from typer.testing import CliRunner

import excise
from excise.cli import app
from tests.faults.verbs import attempt, in_child
from tests.gguf_files import write_gguf
from tests.tiny import tiny_folder, tiny_model

SECONDS = 30.0
# Above what an honest run takes, which is what the imports and a tiny model take.
MEMORY = 1 << 30
SMALL = ("--samples", 4, "--tokens", 16, "--batch-tokens", 32)

STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**24, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "../../other", "/etc/passwd", "\ud83d", "[/x]", "{{ 7*7 }}", "a" * 100_000, "\n# heading\n---\nx: y"),
    *([], {}, [None], [[]], {"x": {}}, [1, 2, 3], {"0": 1}),
)  # fmt: skip

TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x = 'a' %}{{ x * 100000000000 }}",
    "{{ 'a' * 100000000 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% include '/etc/passwd' %}",
    "{{ messages[0].content | center(1000000000000) }}",
)


@dataclass(frozen=True)
class Target:
    """A file to damage, and the command that reads it.

    Attributes:
        kind: of the file.
        folder: copied for each attempt.
        file: in that folder.
        command: takes the copy; returns arguments.

    """

    kind: str
    folder: Path
    file: str
    command: Callable[[Path], tuple[Any, ...]]


def targets(inputs: Path) -> list[Target]:
    """All of them, on real files."""
    _write_inputs(inputs)

    def of(kind: str, folder: str, file: str, *command: Any) -> Target:
        def filled(copy_: Path) -> tuple[Any, ...]:
            names = {"COPY": copy_, "FILE": copy_ / file, "INPUTS": inputs}
            return tuple(
                re.sub("COPY|FILE|INPUTS", lambda m: str(names[m[0]]), part) if isinstance(part, str) else part
                for part in command
            )

        return Target(kind, inputs / folder, file, filled)

    quick = (*SMALL, "--out", "COPY/../out.safetensors")
    prune = ("--removed", 1, "--no-self-test", "--out", "COPY/../out")
    model = "INPUTS/model"
    return [
        *(of(f"config: {verb}", "model", "config.json", *command) for verb, command in (
            ("prune", ("prune", "COPY", *prune)), ("inspect", ("inspect", "COPY")), ("score", ("score", "COPY", *quick)),
        )),
        of("generation config", "model", "generation_config.json", "score", "COPY", *quick),
        of("tokenizer", "model", "tokenizer.json", "score", "COPY", *quick),
        of("tokenizer config", "model", "tokenizer_config.json", "score", "COPY", *quick),
        of("chat template", "model", "chat_template.jinja", "score", "COPY", *quick),
        of("index: prune", "sharded", "model.safetensors.index.json", "prune", "COPY", *prune),
        of("index: score", "sharded", "model.safetensors.index.json", "score", "COPY", *quick),
        of("weights: prune", "model", "model.safetensors", "prune", "COPY", *prune),
        of("weights: score", "model", "model.safetensors", "score", "COPY", *quick),
        of("gguf: prune", "gguf", "model.gguf", "prune", "FILE", "--removed", 1, "--no-self-test", "--out", "COPY/../out.gguf"),
        of("gguf: inspect", "gguf", "model.gguf", "inspect", "FILE"),
        of("npy", "files", "H.npy", "solve", "--hessian", "FILE", "--remove", 2),
        of("npz", "files", "H.npz", "solve", "--hessian", "FILE", "--remove", 2),
        of("weights of units", "files", "w.npy", "solve", "--hessian", "INPUTS/files/H.npy", "--weights", "FILE", "--remove-weight", "25%"),
        of("gradients", "files", "gradients.safetensors", "solve", "FILE", "--remove", 2),
        of("energy", "run", "energy-fitted.safetensors", "solve", "--hessian", "FILE", "--remove", 2),
        of("spectrum", "run", "spectrum-fisher.json", "prune", model, "--spectrum", "FILE", "--no-self-test", "--out", "COPY/../out"),
        of("chats", "files", "chats.jsonl", "score", model, "--data", "FILE", *quick),
        of("table", "files", "table.csv", "score", model, "--data", "FILE", *quick),
        of("questions", "files", "questions.jsonl", "refine", model, "--remove", 2, "--objective", "choices", "--questions", "FILE", "--effort", 0.1, *SMALL, "--out", "COPY/../out"),
        of("recipe", "files", "recipe.yaml", "run", "--recipe", "FILE", "--out", "COPY/../out", "--print-recipe"),
        of("run as a recipe", "run", "run.json", "run", "--recipe", "FILE", "--out", "COPY/../out", "--print-recipe"),
        *(of(f"report: {name}", "run", name, "report", "COPY") for name in ("run.json", "candidates.json", "scores.json", "model/excise.json", "healed/heal.json", "spectrum-fisher.json")),
        of("table: scores", "run", "scores.json", "table", "COPY", "--which", 1),
        of("report: comparison", "compare", "compare.json", "report", "COPY"),
        of("checkpoint's recipe", "pruned", "excise.json", "prune", "COPY", *prune),
        of("scores", "run", "scores.json", "evaluate", "INPUTS/pruned", "--perplexity", "INPUTS/text.txt", "--window", 16, "--limit", 1, "--no-card", "--out", "FILE"),
        of("teacher", "teacher", "teacher.json", "heal", "INPUTS/pruned", "--offline", "COPY", "--samples", 8, "--tokens", 16, "--steps", 1, "--batch", 2, "--out", "COPY/../out"),
    ]  # fmt: skip


def _write_inputs(inputs: Path) -> None:
    from tests.faults.verbs import verbs

    made = {verb.name: verb for verb in verbs(inputs)}
    log = inputs / "log"
    for name, out in (("run --heal", "run"), ("compare", "compare")):
        _done((*made[name].arguments, "--out", inputs / out), log)
    _done((*made["evaluate"].arguments, "--out", inputs / "run" / "scores.json"), log)
    heal = ("--samples", 8, "--tokens", 16, "--steps", 1, "--batch", 2)
    offline = ("heal", inputs / "pruned", "--teacher", inputs / "model", "--offline", inputs / "teacher", *heal)
    _done((*offline, "--out", inputs / "from-teacher"), log)
    tiny_folder(inputs / "sharded", layers=4)
    tiny_model("llama", 4).save_pretrained(inputs / "sharded", max_shard_size="20KB")
    (inputs / "sharded" / "model.safetensors").unlink(missing_ok=True)
    (inputs / "gguf").mkdir()
    write_gguf(tiny_model("llama", 4), inputs / "gguf" / "model.gguf")
    files = inputs / "files"
    files.mkdir()
    A = np.random.default_rng(0).standard_normal((20, 6))
    np.save(files / "H.npy", A.T @ A)
    np.savez_compressed(files / "H.npz", J=A.T @ A, h=A[0])
    np.save(files / "w.npy", np.arange(1.0, 7.0))
    shutil.copy(inputs / "run" / "gradients.safetensors", files)
    chat = {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]}
    (files / "chats.jsonl").write_text("\n".join(json.dumps(chat) for _ in range(8)))
    (files / "table.csv").write_text("prompt,response\n" + "Two and two?,Four.\n" * 8)
    question = {"question": "Two and two?", "choices": ["Three", "Four"], "answer": 1}
    (files / "questions.jsonl").write_text("\n".join(json.dumps(question) for _ in range(8)))
    (files / "recipe.yaml").write_text("model: org/name\nremove: 2\nprotect: [0, -1]\nseed: 3\n")


def _done(arguments: tuple[Any, ...], log: Path) -> None:
    if attempt(arguments, log):
        raise RuntimeError(f"{arguments}: {log.read_text()[-2000:]}")


def damaged(content: bytes, name: str, generator: random.Random) -> bytes:
    """One damage: of its structure where the file has one, else of its bytes."""
    structured = Path(name).suffix in (".json", ".jsonl", ".yaml")
    if structured and generator.random() < 0.8:
        return _damaged_json(content, name, generator)
    if name.endswith(".jinja") and generator.random() < 0.1:
        return generator.choice(TEMPLATES).encode()
    return generator.choice([_flipped, _cut, _grown, _blanked, _replaced])(content, generator)


def _damaged_json(content: bytes, name: str, generator: random.Random) -> bytes:
    if generator.random() < 0.05:
        return generator.choice(
            [b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"[]", b"{}", b"3", b'"x"', b"\xef\xbb\xbf" + content]
        )
    if name.endswith(".jsonl"):
        lines = content.split(b"\n")
        at = generator.randrange(len(lines))
        lines[at] = _damaged_json(lines[at], "line.json", generator)
        return b"\n".join(lines)
    if name.endswith(".yaml"):
        key, _, _ = generator.choice(content.decode().splitlines()).partition(":")
        return content + f"{key}: {json.dumps(generator.choice(STRANGE))}\n".encode()
    value = json.loads(content)
    if isinstance(value, dict):
        # Whoever damages on purpose leaves the seal out.
        value.pop("seal", None)
    for _ in range(generator.choice([1, 1, 1, 2, 5])):
        value = _changed(value, generator)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _changed(value: Any, generator: random.Random) -> Any:
    """One entry, at any depth, replaced, deleted, renamed or doubled."""
    value, places = copy.deepcopy(value), []

    def walk(inner: Any) -> None:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    if not places:
        return generator.choice(STRANGE)
    holder, key = generator.choice(places)
    what = generator.random()
    if what < 0.7:
        holder[key] = copy.deepcopy(generator.choice(STRANGE))
    elif what < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    else:
        holder.append(copy.deepcopy(holder[key]))
    return value


def _flipped(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 8, 64])):
        if changed:
            # Headers are at the front.
            at = generator.randrange(min(len(changed), generator.choice([16, 400, len(changed)])))
            changed[at] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _cut(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content) + 1)]


def _grown(content: bytes, generator: random.Random) -> bytes:
    return content + generator.randbytes(generator.choice([1, 100, 10_000]))


def _blanked(content: bytes, generator: random.Random) -> bytes:
    at = generator.randrange(min(max(1, len(content)), generator.choice([64, 2000, 1 << 62])))
    return content[:at] + bytes([generator.choice([0, 255])]) * 8 + content[at + 8 :]


def _replaced(content: bytes, generator: random.Random) -> bytes:
    return generator.choice([b"", b"\0" * 100, generator.randbytes(1000), b"{}", b"PK\x03\x04" + content])


def tried(target: Target, content: bytes, place: Path) -> tuple[str, float, int]:
    """What is wrong with how a command takes a file (empty where nothing is), its seconds, and its peak memory."""
    folder = place / "copy"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(target.folder, folder, symlinks=True)
    (folder / target.file).write_bytes(content)
    log, started = place / "log", time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(in_child([str(part) for part in target.command(folder)], log, lambda: None))
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        seconds = time.perf_counter() - started
        if done:
            break
        # Of its own time, lest a busy machine make a hang of what only waits for its turn.
        if seconds > SECONDS and (_own_seconds(child) > SECONDS or seconds > 20 * SECONDS):
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"hangs: more than {SECONDS:.0f} s", seconds, 0
        time.sleep(0.005)
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, 2) or "Traceback (most recent call last)" in said:
        return f"exits with {code}: {said[-900:]}", seconds, usage.ru_maxrss * 1024
    return "", seconds, usage.ru_maxrss * 1024


def _own_seconds(process: int) -> float:
    try:
        times = psutil.Process(process).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def import_everything(place: Path) -> None:
    """Whatever the children will import, once for all of them: they are forked, and imports take most of their time."""
    for module in pkgutil.walk_packages(excise.__path__, "excise."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # And what the libraries import when they are used: one small job in this process.
    folder = tiny_folder(place / "first", layers=2)
    for command in (("inspect", folder), ("score", folder, *SMALL, "--out", place / "first.safetensors")):
        CliRunner().invoke(app, [str(part) for part in command])


def campaign(inputs: int, seed: int, only: str, place: Path) -> dict[str, Any]:
    """Figures per kind of file."""
    every = [target for target in targets(place / "inputs") if only in target.kind]
    figures: dict[str, Any] = {}
    for target in every:
        whole = (target.folder / target.file).read_bytes()
        fault, _, honest = tried(target, whole, place / "attempt")
        figures[target.kind] = {
            "inputs": 0,
            "foreign": [],
            "slowest": 0.0,
            "seconds": 0.0,
            "memory": [],
            "honest": honest,
        }
        if fault:
            figures[target.kind]["foreign"].append(f"honest: {fault}")
    for number in range(inputs):
        target = every[number % len(every)]
        generator = random.Random(f"{seed} {number}")
        content = damaged((target.folder / target.file).read_bytes(), target.file, generator)
        fault, seconds, peak = tried(target, content, place / "attempt")
        counts = figures[target.kind]
        counts["inputs"] += 1
        counts["seconds"] = round(counts["seconds"] + seconds, 1)
        counts["slowest"] = max(counts["slowest"], round(seconds, 1))
        if peak > counts["honest"] + MEMORY:
            counts["memory"].append(f"{number}: {peak / 1e9:.1f} GB")
        if fault:
            counts["foreign"].append(f"{number}: {fault}")
            print(f"{target.kind}, input {number}: {fault}", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Parse the command line and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # A wrong claim must not take the machine along.
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    with tempfile.TemporaryDirectory() as place:
        os.environ["EXCISE_CACHE"] = str(Path(place) / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        import_everything(Path(place))
        figures = campaign(arguments.n, arguments.seed, arguments.only, Path(place))
    total = sum(counts["inputs"] for counts in figures.values())
    foreign = sum(len(counts["foreign"]) for counts in figures.values())
    print(json.dumps({"seed": arguments.seed, "inputs": total, "foreign": foreign, "kinds": figures}, indent=1))


if __name__ == "__main__":
    main()
