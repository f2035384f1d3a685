"""What healing gives: held-out loss of several removals before it, after repair, after training, and after both.

Prints a Markdown table and writes `results.json` and `curves.png`; an interrupted run goes on where it stopped. The
teacher is recorded once for all. About four passes over the training tokens for each removal, twice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.weights import HOW_TO_INSTALL, smollm2
from excise.artefacts import read_json, write_json
from excise.calibration import Samples, load_samples
from excise.cli.options import indices
from excise.healing.heal import heal
from excise.healing.repair import Repair, repair, repaired
from excise.healing.settings import Settings
from excise.healing.teachers import INDEX, OfflineTeacher, record_teacher
from excise.measure import measure
from excise.models.loading import Loaded, load
from excise.report.figures import save_figure
from excise.report.text import ranges
from excise.surgery.checkpoint import write_pruned

# Of SmolLM2-135M-Instruct at M = 8: what `make demo` lists (docs/log.md), and docs/results.md's best measured.
REMOVALS = (
    "the paper's ground state=20-22,24-26,28,29",
    "block influence, iterative=3,4,12-15,17,25",
    "norm ratio=5,10,12-14,16-18",
    "measured=12-18,26",
)


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
    intact = measure(loaded.stack, held_out, [()]).loss()
    recorded = out / "teacher"
    if not (recorded / INDEX).exists():
        record_teacher(loaded.stack, train, recorded, k=options.top_k)
    teacher = OfflineTeacher.open(recorded, train)
    rows = []
    for number, text in enumerate(options.removal or REMOVALS):
        name, _, blocks = text.partition("=")
        place, removed = out / f"removal-{number}", indices(blocks, "--removal")
        rows.append(_heal_removal(loaded, removed, train, held_out, teacher, settings, place, options.repair_samples))
        rows[-1] |= {"name": name, "removed": list(removed)}
        print(f"{name}: done", file=sys.stderr)
    facts = {"intact": intact, "rows": rows, "kept_mass": teacher.facts["kept_mass"], "train": train.describe()}
    write_json(out / "results.json", {**facts, "held_out": held_out.describe(), "settings": vars(options)})
    save_figure(_curves(rows), out / "curves.png")
    print(_table(intact, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.healing_results", description=__doc__)
    parser.add_argument("--model", default=None, help="folder, hub id or .gguf (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--removal", action="append", help="NAME=BLOCKS, such as measured=12-18,26; repeat for more")
    parser.add_argument("--data", default="starter", help="source of all samples")
    parser.add_argument("--samples", type=int, default=600, help="to train on")
    parser.add_argument("--repair-samples", type=int, default=64, help="of those, to fit the repair on")
    parser.add_argument("--held-out", type=int, default=32, help="to judge by")
    parser.add_argument("--tokens", type=int, default=192, help="longest sample")
    parser.add_argument("--batch", type=int, default=4, help="samples an optimiser step")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--top-k", type=int, default=256, help="tokens kept of the teacher at each position")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/healing")
    options = parser.parse_args()
    options.model = str(options.model or smollm2() or sys.exit(f"no weights: {HOW_TO_INSTALL}, or pass --model"))
    return options


def _heal_removal(
    loaded: Loaded,
    removed: tuple[int, ...],
    train: Samples,
    held_out: Samples,
    teacher: OfflineTeacher,
    settings: Settings,
    place: Path,
    repair_samples: int,
) -> dict[str, Any]:
    """Losses of one removal: as it is, repaired, trained, and trained from the repaired weights."""
    if not (place / "repair.safetensors").exists():
        repair(loaded.stack, removed, train[:repair_samples], held_out=held_out).save(place / "repair.safetensors")
    fitted = Repair.load(place / "repair.safetensors")
    assert fitted.losses is not None
    row: dict[str, Any] = {"pruned": fitted.losses.pruned, "repaired": fitted.losses.repaired}
    for name in ("trained", "repaired and trained"):
        healed, start = place / name.replace(" ", "-"), place / f"start-{name.replace(' ', '-')}"
        if not (healed / "heal.json").exists():
            if not start.exists():
                _write_start(loaded, removed, fitted if name != "trained" else None, start)
            heal(load(str(start), dtype="float32"), teacher, train, held_out, healed, settings, force=True)
            shutil.rmtree(start)
        facts = read_json(healed / "heal.json")
        row |= {name: facts["losses"]["healed"], f"{name} curve": facts["curve"], f"{name} seconds": facts["seconds"]}
    return row


def _write_start(loaded: Loaded, removed: tuple[int, ...], fitted: Repair | None, folder: Path) -> None:
    if fitted is None:
        write_pruned(loaded.stack, removed, folder, tokenizer=loaded.tokenizer)
        return
    with repaired(loaded.stack, fitted):
        write_pruned(loaded.stack, removed, folder, tokenizer=loaded.tokenizer)


def _table(intact: float, rows: list[dict[str, Any]]) -> str:
    columns = ("pruned", "repaired", "trained", "repaired and trained")
    lines = [f"Held-out loss above the original's {intact:.3f} nats/token:\n"]
    lines += ["| removal | blocks | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for row in rows:
        cells = " | ".join(f"{row[column] - intact:+.3f}" for column in columns)
        lines.append(f"| {row['name']} | {ranges(row['removed'])} | {cells} |")
    return "\n".join(lines)


def _curves(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.0, 4.4))
    axes = figure.subplots()
    for number, row in enumerate(rows):
        for name, style in (("trained", "-"), ("repaired and trained", "--")):
            curve = row[f"{name} curve"]
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
