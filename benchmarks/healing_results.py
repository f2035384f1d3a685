"""What healing gives: held-out loss of several removals before it, after repair, after training, and after both.

    python -m benchmarks.healing_results --removal "iterative=3,6,12-15,17,25" --removal "SWM=figure/5,14,18,20" …

A removal is NAME=BLOCKS, or NAME=RULE/BLOCKS where its runs are merged by a rule of SWM instead of dropped. Prints a
Markdown table and writes `results.json` and `curves.png`; the healed checkpoints stay, for `excise evaluate`. An
interrupted run goes on where it stopped. The teacher is recorded once for all, and again for each `on-policy`, whose
samples are what the repaired student says. Training takes about three passes over the training tokens for each removal
and each of `--ways`. Every loss is told by domain too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import save_figure
from benchmarks.weights import HOW_TO_INSTALL, smollm2
from excise.artefacts import read_json, write_json
from excise.context import Context
from excise.data import Samples, load_samples
from excise.data.answers import own_answers
from excise.data.sources import OWN
from excise.healing.heal import heal
from excise.healing.settings import Settings
from excise.healing.teachers import INDEX, OfflineTeacher, record_teacher
from excise.measuring.measure import measure
from excise.measuring.ratios import by_domain
from excise.models.loading import Loaded, load
from excise.repair.refitted import Repair
from excise.repair.repair import repair, repaired
from excise.settings import indices
from excise.surgery.checkpoint import write_pruned
from excise.surgery.merge import merging
from excise.text import ranges

# Of SmolLM2-135M-Instruct at M = 8, as chosen in docs/results.md (seed 0 of the selection; SWM in the log's table).
REMOVALS = (
    "the paper's ground state=20,23-29",
    "an excited state=19-21,24,25,27-29",
    "block influence, iterative=3,6,12-15,17,25",
    "SWM=figure/5,14,18,20,22,24,26,28",
    "norm ratio=5,6,9,10,12,14,17,18",
    "default=3-5,16-18,25,26",
)


@dataclass(frozen=True)
class Way:
    """A training.

    Attributes:
        repaired: it starts from the repaired weights.
        train: what learns, as for `excise heal --train`.
        on_policy: its samples are the student's own answers to the prompts of the others.

    """

    repaired: bool = True
    train: str = "all"
    on_policy: bool = False


WAYS = {
    "trained": Way(repaired=False),
    "repaired and trained": Way(),
    "cheap": Way(train="refitted"),
    "on-policy": Way(on_policy=True),
    "last three": Way(repaired=False, train="last"),
}
COLUMNS = ("pruned", "repaired", *WAYS)


def main() -> None:
    """Run the experiment and print its table."""
    options = _options()
    loaded = load(options.model, dtype="float32")
    drawn = load_samples(
        options.data,
        loaded.tokenizer,
        samples=options.samples + options.held_out,
        tokens=options.tokens,
        seed=options.seed,
    )
    train, held_out = drawn[: len(drawn) - options.held_out], drawn[len(drawn) - options.held_out :]
    settings = Settings(learning_rate=options.lr, batch=options.batch, epochs=options.epochs, seed=options.seed)
    out = Path(options.out)
    intact = measure(Context(loaded), held_out, [()])
    task = Task(loaded, train, held_out, intact.of(), settings, options)
    teacher = _recorded(task, train, out / "teacher")
    facts = {"intact": intact.loss(), "kept_mass": teacher.facts["kept_mass"], "train": train.describe()}
    facts |= {"held_out": held_out.describe(), "settings": vars(options), "rows": []}
    for text in options.removal or REMOVALS:
        removal = _parse(text)
        facts["rows"].append(_heal_removal(task, removal, teacher, out / f"removal-{removal.slug}"))
        # After each: what is interrupted has told of the others.
        write_json(out / "results.json", facts)
        print(f"{removal.name}: done", file=sys.stderr)
    save_figure(_curves(facts["rows"]), out / "curves.png")
    print(_table(facts["intact"], facts["rows"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healing_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=None, help="folder, hub id or .gguf (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--removal", action="append", help="see above; repeat for more")
    parser.add_argument("--ways", default="trained", help=f"trainings, with commas between them: {', '.join(WAYS)}")
    parser.add_argument("--data", default="starter", help="source of all samples")
    parser.add_argument("--samples", type=int, default=600, help="to train on")
    parser.add_argument("--repair-samples", type=int, default=64, help="of those, to fit the repair on")
    parser.add_argument("--held-out", type=int, default=32, help="to judge by")
    parser.add_argument("--tokens", type=int, default=192, help="longest sample")
    parser.add_argument("--batch", type=int, default=4, help="samples per optimiser step")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--top-k", type=int, default=256, help="tokens kept of the teacher at each position")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/healing")
    options = parser.parse_args()
    options.model = str(options.model or smollm2() or sys.exit(f"no weights: {HOW_TO_INSTALL}, or pass --model"))
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - set(WAYS):
        sys.exit(f"expected --ways among {', '.join(WAYS)}, got {', '.join(sorted(unknown))}")
    return options


@dataclass(frozen=True)
class Removal:
    """A row of the table: blocks dropped, or merged by a rule of SWM."""

    name: str
    removed: tuple[int, ...]
    rule: str | None

    @property
    def slug(self) -> str:
        """What its folder is called."""
        return "-".join(filter(None, (self.rule, ranges(self.removed).replace("–", "-"))))


@dataclass(frozen=True, eq=False)
class Task:
    """What all rows have in common; `intact` are the original's loss sums [samples] on the held-out samples."""

    loaded: Loaded
    train: Samples
    held_out: Samples
    intact: np.ndarray
    settings: Settings
    options: argparse.Namespace


def _parse(text: str) -> Removal:
    name, _, what = text.partition("=")
    rule, slash, blocks = what.rpartition("/")
    return Removal(name, indices(blocks, "--removal"), rule if slash else None)


def _recorded(task: Task, samples: Samples, place: Path) -> OfflineTeacher:
    if not (place / INDEX).exists():
        record_teacher(Context(task.loaded), samples, place, k=task.options.top_k)
    return OfflineTeacher.open(place, samples)


def _heal_removal(task: Task, removal: Removal, teacher: OfflineTeacher, place: Path) -> dict[str, Any]:
    """Losses of one removal: as it is, repaired, and trained in each way."""
    row: dict[str, Any] = {"name": removal.name, "removed": list(removal.removed), "rule": removal.rule}
    context = Context(task.loaded)
    with merging(task.loaded.stack, removal.removed, removal.rule):
        row |= _told(task, "pruned", context, removal.removed)
    fitted = None if removal.rule else _fitted(task, removal, place)
    if fitted is not None:
        with repaired(task.loaded.stack, fitted):
            row |= _told(task, "repaired", context, removal.removed)
    for name in task.options.ways:
        # A repair is fitted to what was dropped.
        if WAYS[name].repaired and fitted is None:
            continue
        folder = place / name.replace(" ", "-")
        facts = _trained(task, removal, WAYS[name], teacher, fitted, folder)
        row |= _told(task, name, Context(load(str(folder), dtype="float32")), ())
        row |= {f"{name} curve": facts["curve"], f"{name} seconds": facts["seconds"]}
        row[f"{name} tokens"] = facts["samples"]["total_tokens"]
    return row


def _told(task: Task, name: str, context: Context, removed: tuple[int, ...]) -> dict[str, Any]:
    """Loss of a model without some blocks, and its damage in each domain."""
    measured = measure(context, task.held_out, [removed])
    damage = by_domain(measured.of(removed) - task.intact, measured.counts, task.held_out.domains)
    return {name: measured.loss(removed), f"{name} domains": damage}


def _trained(
    task: Task, removal: Removal, way: Way, teacher: OfflineTeacher, fitted: Repair | None, folder: Path
) -> dict[str, Any]:
    """Train in one way; returns `heal.json`."""
    if (folder / "heal.json").exists():
        return read_json(folder / "heal.json")
    start, samples = folder.with_name(f"start-{folder.name}"), task.train
    if not start.exists():
        _write_start(task.loaded, removal, fitted if way.repaired else None, start)
    student = load(str(start), dtype="float32")
    if way.on_policy:
        samples = _own_words(task, student)
        teacher = _recorded(task, samples, folder.with_name(f"teacher-{folder.name}"))
    facts = heal(student, teacher, samples, task.held_out, folder, replace(task.settings, train=way.train), force=True)
    shutil.rmtree(start)
    return facts


def _own_words(task: Task, student: Loaded) -> Samples:
    """The training prompts with the student's answers."""
    options, own = task.options, own_answers(student)
    drawing = {"samples": options.samples, "tokens": options.tokens, "seed": options.seed}
    drawn = load_samples(f"{OWN}={options.data}", student.tokenizer, own=own, **drawing)
    return drawn.apart_from(task.held_out)


def _fitted(task: Task, removal: Removal, place: Path) -> Repair:
    path = place / "repair.safetensors"
    if not path.exists():
        repair(Context(task.loaded), removal.removed, task.train[: task.options.repair_samples]).save(path)
    return Repair.load(path)


def _write_start(loaded: Loaded, removal: Removal, fitted: Repair | None, folder: Path) -> None:
    """The checkpoint that training starts from."""
    changed = repaired(loaded.stack, fitted) if fitted else merging(loaded.stack, removal.removed, removal.rule)
    card = {"original": loaded.source, "proposed_by": removal.name}
    with changed:
        source = {"source": loaded.folder, "tokenizer": loaded.tokenizer}
        write_pruned(loaded.stack, removal.removed, folder, card=card, **source)


def _table(intact: float, rows: list[dict[str, Any]]) -> str:
    lines = [f"Held-out loss above the original's {intact:.3f} nats/token:\n"]
    lines += ["| removal | blocks | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = " | ".join(f"{row[column] - intact:+.3f}" if column in row else "" for column in COLUMNS)
        merged = " merged" if row["rule"] else ""
        lines.append(f"| {row['name']} | {ranges(row['removed'])}{merged} | {cells} |")
    return "\n".join(lines)


def _curves(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.0, 4.4))
    axes = figure.subplots()
    for number, row in enumerate(rows):
        for name, style in zip(WAYS, ("-", "--", ":", "-.", (0, (1, 3))), strict=True):
            curve = row.get(f"{name} curve", ())
            if not curve:
                continue
            steps, losses = ([entry[key] for entry in curve] for key in ("step", "loss"))
            axes.plot(steps, losses, style, color=f"C{number}", linewidth=1, label=f"{row['name']}, {name}")
    axes.set_xlabel("step")
    axes.set_ylabel("distillation loss (nats/token)")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
