"""Flip bytes in every artefact of a run and read it: what is accepted must be what was written.

python -m tests.faults.flips --n 100 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from excise.artefacts import read_json
from excise.context import Context
from excise.data import Fit, load_samples
from excise.errors import ExciseError
from excise.evaluation.panel.panel import Panel
from excise.healing.teachers import OfflineTeacher, record_teacher
from excise.ising.energies import Energy
from excise.ising.gradients import Gradients
from excise.ising.spectrum import Spectrum
from excise.models.loading import load
from excise.repair.refitted import Repair
from excise.run import RunResult
from excise.store import Journal, Ledger
from tests.faults.verbs import attempt, verbs

Reader = Callable[[Path], Any]


def _gradients(path: Path) -> Any:
    read = Gradients.load(path)
    return read.A.tobytes(), read.losses.tobytes(), read.gate_blocks, read.gate_kinds, read.names


def _energy(path: Path) -> Any:
    read = Energy.load(path)
    return read.h.tobytes(), read.J.tobytes(), read.labels


def _spectrum(path: Path) -> Any:
    read = Spectrum.load(path)
    return read.states, read.certified


def _repair(path: Path) -> Any:
    read = Repair.load(path)
    return read.removed, {name: weight.float().numpy().tobytes() for name, weight in sorted(read.weights.items())}


def _batch(path: Path) -> Any:
    """A batch of a journal; None, which has it made again, where it is damaged."""
    try:
        key = read_json(path.parent / "key.json")["key"]
    except ExciseError:
        return None
    found = Journal(path.parent, key).get(int(path.stem.rpartition("-")[2]))
    return found and {name: array.tobytes() for name, array in sorted(found.items())}


def _ledger(path: Path) -> Any:
    ledger = Ledger(path.parent)
    return {removed: ledger[removed].tobytes() for removed in sorted(ledger)}


def _json(path: Path) -> Any:
    """Without a seal whose name was hit: then the file counts as somebody else's, and nobody reads that entry."""
    return {name: entry for name, entry in read_json(path).items() if not _is_seal(entry)}


def _is_seal(entry: Any) -> bool:
    return isinstance(entry, dict) and len(entry) == 2 and len(str(entry.get("sha256"))) == 64


def artefacts(place: Path) -> list[tuple[str, Path, Reader, bool]]:
    """Kind, file, reader, and whether what is damaged is made again instead of refused; made by real commands."""
    for verb in verbs(place / "inputs"):
        if verb.name in ("run --heal", "compare", "evaluate"):
            folder = place / verb.name
            folder.mkdir()
            if attempt((*verb.arguments, "--out", folder / verb.out), folder / "log"):
                raise RuntimeError((folder / "log").read_text()[-2000:])
    run, model = place / "run --heal" / "out", place / "inputs" / "model"
    loaded = load(str(model))
    samples = load_samples("starter", loaded.tokenizer, samples=6, tokens=24, fit=Fit.of(loaded.stack))
    record_teacher(Context(loaded, batch_tokens=48), samples, place / "teacher", k=8)

    def teacher(path: Path) -> Any:
        opened = OfflineTeacher.open(path.parent, samples)
        return opened.facts, opened.places, _batch(place / "teacher" / "batch-000000.safetensors")

    found: list[tuple[str, Path, Reader, bool]] = [
        ("gradients", run / "gradients.safetensors", _gradients, False),
        ("energy", run / "energy-fitted.safetensors", _energy, False),
        ("spectrum", run / "spectrum-fisher.json", _spectrum, False),
        ("run", run / "run.json", RunResult.load, False),
        ("panel", run / "panel.json", Panel.load, False),
        ("candidates", run / "candidates.json", _json, False),
        ("recipe", run / "model" / "excise.json", _json, False),
        ("healing", run / "healed" / "heal.json", _json, False),
        ("comparison", place / "compare" / "out" / "compare.json", _json, False),
        ("scores", place / "evaluate" / "scores.json", _json, False),
        ("teacher's shard", place / "teacher" / "batch-000000.safetensors", teacher, False),
        ("teacher's index", place / "teacher" / "teacher.json", teacher, False),
    ]
    kinds: dict[str, tuple[str, Reader, bool]] = {
        "batch-*.safetensors": ("journal", _batch, True),
        "part-*.safetensors": ("ledger", _ledger, True),
        "repair-*.safetensors": ("repair", _repair, True),
    }
    for pattern, (kind, reader, again) in kinds.items():
        found += [(kind, path, reader, again) for path in sorted((run / "work").rglob(pattern))[:3]]
    return found


def campaign(place: Path, flips: int, seed: int) -> dict[str, Any]:
    """Per kind: flips, refused, made again, accepted unchanged, and accepted with another content."""
    figures: dict[str, dict[str, Any]] = {}
    for kind, path, reader, _ in artefacts(place):
        whole, generator = path.read_bytes(), random.Random(f"{seed} {kind} {path.name}")
        expected = pickle.dumps(reader(path))
        counts = figures.setdefault(
            kind, {"files": 0, "flips": 0, "refused": 0, "made again": 0, "the same": 0, "WRONG": [], "foreign": []}
        )
        counts["files"] += 1
        for _ in range(flips):
            at, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            counts["flips"] += 1
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    value = reader(path)
                except ExciseError:
                    counts["refused"] += 1
                    continue
                except Exception as error:
                    counts["foreign"].append(f"{path.name}[{at}] ^ {bit}: {error!r}")
                    continue
            if any("damaged" in str(warning.message) for warning in told) or value is None:
                counts["made again"] += 1
            elif pickle.dumps(value) == expected:
                counts["the same"] += 1
            else:
                counts["WRONG"].append(f"{path.name}[{at}] ^ {bit}")
        path.write_bytes(whole)
    return figures


def main() -> None:
    """Parse the command line and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="flips per file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["EXCISE_CACHE"] = str(Path(place) / "cache")
        figures = campaign(Path(place), arguments.n, arguments.seed)
    print(json.dumps({"seed": arguments.seed, "artefacts": figures}, indent=1))


if __name__ == "__main__":
    main()
