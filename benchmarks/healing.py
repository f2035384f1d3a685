"""What one step of distillation costs: ours against TRL's two distillation losses and the textbook's.

Prints one JSON line. A step is the teacher's forward, the student's forward and backward, and AdamW's update, on the
same batch for every way: `ours` (chunked, gradient taken while the logits exist), `plain` (whole logits, textbook),
`trl_gkd` (the loss of TRL's GKDTrainer at beta = 0, which is the same forward KL, on whole logits) and `trl_chunked`
(the loss of TRL's DistillationTrainer at beta = 0, in tiles). Timings are interleaved and given as ratios within a
repetition. Peak memory is that of a process of its own for each way: the peak of one step above what is resident
before it (models, optimiser state, no gradients; Linux only).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.weights import HOW_TO_INSTALL, smollm2
from excise.data import load_samples
from excise.data.batches import IGNORED, Batch, pad
from excise.healing.losses import vocabulary_loss
from excise.healing.teachers import OnlineTeacher
from excise.models.loading import load
from excise.models.stack import Stack
from excise.settings import indices
from excise.surgery.checkpoint import write_pruned

LEARNING_RATE = 1e-6


@dataclass(frozen=True, eq=False)
class Pair:
    """A student, its teacher, and the batch they meet on."""

    student: Stack
    teacher: Stack
    batch: Batch


def ours(pair: Pair) -> Tensor:
    """The loss that `excise heal` trains on."""
    batch = pair.batch
    lesson = OnlineTeacher(pair.teacher).lesson(batch.input_ids, batch.labels, batch.indices, ())
    loss = vocabulary_loss(pair.student, pair.student.hidden(batch.input_ids), batch.labels, lesson.targets)
    return loss.total / loss.count


def plain(pair: Pair) -> Tensor:
    """KL(teacher ‖ student) over whole logits, by the textbook."""
    student, teacher = _logits(pair)
    counted = pair.batch.labels[:, :-1] != IGNORED
    p, q = torch.log_softmax(teacher, dim=-1), torch.log_softmax(student, dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)[counted].mean()


def trl_gkd(pair: Pair) -> Tensor:
    """The loss of TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = _logits(pair)
    labels = pair.batch.labels[:, :-1]
    count = int((labels != IGNORED).sum())
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=0.0, num_items_in_batch=count)


def trl_chunked(pair: Pair) -> Tensor:
    """The loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    ids, labels = pair.batch.input_ids, pair.batch.labels
    student = pair.student.hidden(ids)
    with torch.no_grad():
        teacher = pair.teacher.hidden(ids)
    heads = [stack.model.get_output_embeddings().weight for stack in (pair.student, pair.teacher)]
    return _chunked_divergence_loss(student, teacher, *heads, labels != IGNORED, beta=0.0)[0]


WAYS: dict[str, Callable[[Pair], Tensor]] = {
    "ours": ours, "plain": plain, "trl_gkd": trl_gkd, "trl_chunked": trl_chunked,
}  # fmt: skip


def main() -> None:
    """Run the benchmark and print its line."""
    options = _options()
    pair = _pair(options)
    if options.peak_of:
        print(json.dumps(_peak_bytes(pair, WAYS[options.peak_of])))
        return
    seconds, losses = _time_steps(pair, options.repetitions)
    tokens = pair.batch.tokens
    facts = {"blocks": f"{len(pair.student.blocks)} of {len(pair.teacher.blocks)}", "tokens": tokens}
    del pair
    gc.collect()
    peaks = {way: _peak_in_child(options, way) for way in WAYS}
    rivals = [way for way in WAYS if way != "ours"]
    ratios = {way: [a / b for a, b in zip(seconds[way], seconds["ours"], strict=True)] for way in rivals}
    result = {
        **{f"speed_over_{way}": round(statistics.median(ratios[way]), 3) for way in rivals},
        **{f"peak_of_{way}": round(peaks["ours"] / peaks[way], 3) for way in rivals},
        "spread": {way: [round(min(values), 3), round(max(values), 3)] for way, values in ratios.items()},
        "tokens_per_second": {way: round(tokens / statistics.median(values), 1) for way, values in seconds.items()},
        "peak_bytes": peaks,
        "losses": losses,
        "model": Path(options.model).name,
        **facts,
        "repetitions": options.repetitions,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def _logits(pair: Pair) -> tuple[Tensor, Tensor]:
    ids = pair.batch.input_ids
    student = pair.student.model(input_ids=ids, use_cache=False).logits[:, :-1]
    with torch.no_grad():
        return student, pair.teacher.model(input_ids=ids, use_cache=False).logits[:, :-1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.healing", description=__doc__)
    parser.add_argument("--model", default=None, help="folder, hub id or .gguf (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--removed", default="12-18,26", help="blocks that the student lacks")
    parser.add_argument("--samples", type=int, default=4, help="chats in the batch, from the starter set")
    parser.add_argument("--tokens", type=int, default=192, help="longest chat")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--quick", action="store_true", help="one repetition: does it run at all")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or smollm2()
    if options.model is None:
        sys.exit(f"no weights: {HOW_TO_INSTALL}, or pass --model")
    options.model = str(options.model)
    if options.quick:
        options.repetitions = 1
    return options


def _pair(options: argparse.Namespace) -> Pair:
    original = load(options.model, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "student"
        removed = indices(options.removed, "--removed")
        write_pruned(original.stack, removed, folder, source=original.folder, tokenizer=original.tokenizer)
        student = load(str(folder), dtype="float32", device="cpu").stack
    samples = load_samples(
        "starter", original.tokenizer, samples=options.samples, tokens=options.tokens, seed=options.seed
    )
    original.stack.model.requires_grad_(False)
    return Pair(student, original.stack, pad(list(samples), tuple(range(len(samples)))))


def _step(pair: Pair, way: Callable[[Pair], Tensor], optimiser: torch.optim.Optimizer) -> float:
    loss = way(pair)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def _optimiser(pair: Pair) -> torch.optim.Optimizer:
    return torch.optim.AdamW(pair.student.model.parameters(), lr=LEARNING_RATE)


def _time_steps(pair: Pair, repetitions: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each way's step, by repetition; and the losses of all ways before any step."""
    with torch.no_grad():
        losses = {name: float(way(pair)) for name, way in WAYS.items()}
    optimiser = _optimiser(pair)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repetition in range(repetitions + 1):
        for name, way in WAYS.items():
            start = time.perf_counter()
            _step(pair, way, optimiser)
            if repetition > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds, losses


def _peak_in_child(options: argparse.Namespace, way: str) -> int:
    command = [sys.executable, "-m", "benchmarks.healing", "--peak-of", way, "--model", options.model]
    for name in ("removed", "samples", "tokens", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def _peak_bytes(pair: Pair, way: Callable[[Pair], Tensor]) -> int:
    """Peak resident memory of one step, above what is resident before it."""
    optimiser = _optimiser(pair)
    shortest = Pair(pair.student, pair.teacher, _first_tokens(pair.batch, 4))
    _step(shortest, way, optimiser)  # allocates the optimiser's state
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # hand back what was freed, else the step would reuse it unseen
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers VmHWM to the present
    _step(pair, way, optimiser)
    return _status_bytes("VmHWM") - before


def _first_tokens(batch: Batch, tokens: int) -> Batch:
    ids, labels = batch.input_ids[:, :tokens], batch.labels[:, :tokens]
    return Batch(batch.indices, ids, labels, batch.lengths.clamp(max=tokens))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    main()
