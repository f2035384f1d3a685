"""What the gradient pass costs: against a forward pass without gradients, and against the loop it replaces.

Prints one JSON line. Every figure is a ratio of two timings of the same repetition on the same samples, so that a busy
machine disturbs both; the median over the repetitions is given, and their spread. Peak memory is taken in a process of
its own for each way, above the resident memory after loading and one short forward pass (Linux only).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.weights import HOW_TO_INSTALL, smollm2
from excise.context import Context
from excise.data import Batch, Samples, load_samples
from excise.measuring.losses import sample_losses
from excise.measuring.score import score
from excise.models.loading import Loaded, load
from excise.models.stack import Stack, gated

WAYS = ("score", "loop", "frozen_loop")


def main() -> None:
    """Run the benchmark and print its line."""
    options = _options()
    loaded = load(options.model, dtype="float32", device="cpu")
    stack = loaded.stack
    samples = load_samples("starter", loaded.tokenizer, samples=options.samples, seed=options.seed)
    if options.peak_of:
        print(json.dumps(_peak_bytes(stack, samples, options.peak_of)))
        return
    seconds, difference = _time_passes(stack, samples, options.repetitions)
    del loaded, stack
    gc.collect()
    peaks = {way: _peak_in_child(options, way) for way in WAYS}
    ratios = {
        "ratio_forward": _ratios(seconds, "score", "forward"),
        "ratio_plain_forward": _ratios(seconds, "score", "plain_forward"),
        "ratio_loop": _ratios(seconds, "loop", "score"),
        "ratio_frozen_loop": _ratios(seconds, "frozen_loop", "score"),
    }
    result = {
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "peak_rss_ratio": round(peaks["score"] / peaks["loop"], 3),
        "peak_rss_bytes": peaks,
        "peak_rss_is": "peak resident memory of a pass above that after loading and one short forward",
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()},
        "median_seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "max_relative_difference_from_loop": difference,
        "model": Path(options.model).name,
        "samples": len(samples),
        "tokens": samples.tokens,
        "repetitions": options.repetitions,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def gradient_loop(stack: Stack, samples: Samples) -> np.ndarray:
    """The straightforward way: one sample at a time, gates multiplied in, the stock loss over full logits, backward.

    On a model as it is loaded, backward fills the gradients of the weights too; the frozen loop spares those.

    Returns:
        A [samples, gates].

    """
    rows = []
    alpha = torch.ones(len(stack.sublayers), requires_grad=True)
    with gated(stack, alpha):
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
            stack.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            rows.append(alpha.grad.clone())
            alpha.grad = None
            stack.model.zero_grad()
    return torch.stack(rows).numpy()


def frozen_gradient_loop(stack: Stack, samples: Samples) -> np.ndarray:
    """The same loop, by someone who thought of freezing the weights."""
    stack.model.requires_grad_(False)
    try:
        return gradient_loop(stack, samples)
    finally:
        stack.model.requires_grad_(True)


@torch.no_grad()
def forward_pass(stack: Stack, batches: list[Batch]) -> None:
    """Losses of the batches, without gradients: the floor from which the gradient pass is counted."""
    for batch in batches:
        sample_losses(stack, stack.hidden(batch.input_ids), batch.labels)


@torch.no_grad()
def plain_forward_pass(stack: Stack, batches: list[Batch]) -> None:
    """Stock forward of the batches, logits at every position, without gradients."""
    for batch in batches:
        stack.model(input_ids=batch.input_ids, attention_mask=batch.real.long(), use_cache=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=__doc__)
    parser.add_argument("--model", default=None, help="folder, hub id or .gguf (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--samples", type=int, default=32, help="chats drawn from the starter set")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--quick", action="store_true", help="8 samples, one repetition: does it run at all")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or smollm2()
    if options.model is None:
        sys.exit(f"no weights: {HOW_TO_INSTALL}, or pass --model")
    options.model = str(options.model)
    if options.quick:
        options.samples, options.repetitions = 8, 1
    return options


def _time_passes(stack: Stack, samples: Samples, repetitions: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each pass, by repetition; and how far our A is from the loop's, as a part of its largest entry."""
    batches = Context(Loaded.of(stack)).batches(samples)
    passes: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward_pass(stack, batches),
        # A new context each time: what one keeps must not spare the next its pass.
        "score": lambda: score(Context(Loaded.of(stack)), samples),
        "plain_forward": lambda: plain_forward_pass(stack, batches),
        "loop": lambda: gradient_loop(stack, samples),
        "frozen_loop": lambda: frozen_gradient_loop(stack, samples),
    }
    forward_pass(stack, batches[-1:])
    score(Context(Loaded.of(stack)), samples[:1])
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    results = {}
    for _repetition in range(repetitions):
        for name, run in passes.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    expected = results["loop"]
    difference = float(np.abs(results["score"].A - expected).max() / np.abs(expected).max())
    return seconds, difference


def _ratios(seconds: dict[str, list[float]], over: str, under: str) -> list[float]:
    return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]


def _peak_in_child(options: argparse.Namespace, way: str) -> int:
    command = [sys.executable, "-m", "benchmarks.gradients", "--peak-of", way, "--model", options.model]
    command += ["--samples", str(options.samples), "--seed", str(options.seed)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _peak_bytes(stack: Stack, samples: Samples, way: str) -> int:
    """Peak resident memory of one pass, above what is resident before it."""
    shortest = min(samples, key=lambda sample: len(sample.input_ids))
    with torch.no_grad():
        stack.hidden(torch.from_numpy(shortest.input_ids).unsqueeze(0))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # hand back what loading freed, else the pass would reuse it unseen
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers VmHWM to the present
    {"score": score, "loop": gradient_loop, "frozen_loop": frozen_gradient_loop}[way](stack, samples)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    main()
