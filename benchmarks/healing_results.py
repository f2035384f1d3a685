"""What healing gives: held-out loss of several removals before it, after repair, after training, and after both.

    python -m benchmarks.healing_results --removal "iterative=3,6,12-15,17,25" --removal "SWM=figure/5,14,18,20" …

A removal is NAME=BLOCKS, or NAME=RULE/BLOCKS where its runs are merged by a rule of SWM instead of dropped. Prints a
Markdown table and writes `results.json` and `curves.png`; the healed checkpoints stay, for `excise evaluate`. An
interrupted run goes on where it stopped. The teacher is recorded once for all. Training takes about three passes over
the training tokens for each removal, and as many again with `--start both`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import save_figure
from benchmarks.weights import HOW_TO_INSTALL, smollm2
from excise.artefacts import read_json, write_json
from excise.context import Context
from excise.data import Samples, load_samples
from excise.healing.heal import heal
from excise.healing.settings import Settings
from excise.healing.teachers import INDEX, OfflineTeacher, record_teacher
from excise.measuring.measure import measure
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
STARTS = {"pruned": ("trained",), "repaired": ("repaired and trained",), "both": ("trained", "repaired and trained")}
COLUMNS = ("pruned", "repaired", "trained", "repaired and trained")


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
    intact = measure(Context(loaded), held_out, [()]).loss()
    recorded = out / "teacher"
    if not (recorded / INDEX).exists():
        record_teacher(Context(loaded), train, recorded, k=options.top_k)
    teacher = OfflineTeacher.open(recorded, train)
    rows = []
    for text in options.removal or REMOVALS:
        removal = _parse(text)
        task = Task(loaded, train, held_out, teacher, settings, options.repair_samples)
        rows.append(_heal_removal(task, removal, out / f"removal-{removal.slug}", STARTS[options.start]))
        print(f"{removal.name}: done", file=sys.stderr)
    facts = {"intact": intact, "rows": rows, "kept_mass": teacher.facts["kept_mass"], "train": train.describe()}
    write_json(out / "results.json", {**facts, "held_out": held_out.describe(), "settings": vars(options)})
    save_figure(_curves(rows), out / "curves.png")
    print(_table(intact, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healing_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=None, help="folder, hub id or .gguf (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--removal", action="append", help="see above; repeat for more")
    parser.add_argument("--start", choices=STARTS, default="pruned", help="weights that training starts from")
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
    """What all rows have in common."""

    loaded: Loaded
    train: Samples
    held_out: Samples
    teacher: OfflineTeacher
    settings: Settings
    repair_samples: int


def _parse(text: str) -> Removal:
    name, _, what = text.partition("=")
    rule, slash, blocks = what.rpartition("/")
    return Removal(name, indices(blocks, "--removal"), rule if slash else None)


def _heal_removal(task: Task, removal: Removal, place: Path, ways: Sequence[str]) -> dict[str, Any]:
    """Losses of one removal: as it is, repaired, trained, and trained from the repaired weights."""
    row: dict[str, Any] = {"name": removal.name, "removed": list(removal.removed), "rule": removal.rule}
    fitted = None if removal.rule else _fitted(task, removal, place)
    if fitted is not None:
        assert fitted.losses is not None
        row |= {"pruned": fitted.losses.pruned, "repaired": fitted.losses.repaired}
    for name in ways:
        if name != "trained" and fitted is None:
            continue  # a repair is fitted to what was dropped
        healed, start = place / name.replace(" ", "-"), place / f"start-{name.replace(' ', '-')}"
        if not (healed / "heal.json").exists():
            if not start.exists():
                _write_start(task.loaded, removal, None if name == "trained" else fitted, start)
            student = load(str(start), dtype="float32")
            heal(student, task.teacher, task.train, task.held_out, healed, task.settings, force=True)
            shutil.rmtree(start)
        facts = read_json(healed / "heal.json")
        row |= {name: facts["losses"]["healed"], f"{name} curve": facts["curve"], f"{name} seconds": facts["seconds"]}
        if name == "trained":
            row.setdefault("pruned", facts["losses"]["pruned"])
    return row


def _fitted(task: Task, removal: Removal, place: Path) -> Repair:
    path = place / "repair.safetensors"
    if not path.exists():
        samples = task.train[: task.repair_samples]
        repair(Context(task.loaded), removal.removed, samples, held_out=task.held_out).save(path)
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
        for name, style in (("trained", "-"), ("repaired and trained", "--")):
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
