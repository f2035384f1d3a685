"""Whether two checkouts of this project give the same results: a run, a refinement and a comparison of three models.

    python -m benchmarks.equality BEFORE AFTER [--work FOLDER]

BEFORE and AFTER are checkouts (`git worktree add BEFORE REVISION`); both run in this interpreter's environment, on the
same tiny random Llama, Nemotron-H and Gemma. `run.json`, `candidates.json` and `compare.json` must be equal but for
times, what says where and by what they were made, and keys that only one of them has; every file of `model/` must be
equal to the byte, save for the command and versions on its card. Prints JSON; the exit status is 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = {"llama": 6, "nemotron_h": 6, "gemma3_text": 6}
DATA = ["--samples", "20", "--tokens", "24", "--batch-tokens", "64"]
JOBS = {
    "run": ["run", "MODEL", "--remove", "2", "--out", "run", "--held-out", "6", "--states", "10", *DATA],
    "heal": [
        *["run", "MODEL", "--remove", "2", "--out", "heal", "--held-out", "6", "--effort", "0", "--rivals", ""],
        *["--heal-steps", "2", "--heal-samples", "8", "--heal-tokens", "16", "--heal-batch", "4", *DATA],
    ],
    "refine": ["refine", "MODEL", "--remove", "1,2", "--out", "refine", *DATA[:4]],
    "compare": [
        *["compare", "MODEL", "--remove", "1,2", "--out", "compare", "--eval-samples", "6", "--random", "2"],
        *DATA,
    ],
}
ARTEFACTS = {
    "run": ("run/run.json", "run/candidates.json", "run/model"),
    "heal": ("heal/run.json", "heal/model", "heal/healed"),
    "refine": ("refine/candidates.json",),
    "compare": ("compare/compare.json",),
}
# Times, places, what the new identity of a model changes on purpose, and what seals and keys results.
LEFT_OUT = {
    "unusable",
    "seal",
    "made_by",
    "job",
    "seconds",
    "provenance",
    "model_hash",
    "time",
    "command",
    "versions",
    "load_seconds",
    "figures",
    "settings",
}
RENAMED: dict[str, str] = {}


def tiny_folders(place: Path) -> None:
    """Write the models, once for both."""
    from tests.tiny import tiny_folder

    for name, layers in MODELS.items():
        if not (place / name).exists():
            tiny_folder(place / name, name, layers=layers)


def make(checkout: Path, place: Path, models: Path) -> None:
    """Run every job of every model with the code of one checkout; a job that is there already is kept."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}", "OMP_NUM_THREADS": "1"}
    for name in MODELS:
        folder = place / name
        folder.mkdir(parents=True, exist_ok=True)
        for job, arguments in JOBS.items():
            done = folder / f"{job}.done"
            if done.exists():
                continue
            command = [sys.executable, "-m", "excise", *(str(models / name) if a == "MODEL" else a for a in arguments)]
            ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            done.write_text(ran.stderr if ran.returncode else "")
            print(f"{checkout.name} {name} {job}: exit status {ran.returncode}", file=sys.stderr)


def plain(value: Any) -> Any:
    """A JSON value without what may differ."""
    if isinstance(value, dict):
        return {RENAMED.get(k, k): plain(v) for k, v in value.items() if k not in LEFT_OUT}
    return [plain(v) for v in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two JSON values differ; keys that only `after` has do not count."""
    if isinstance(before, dict) and isinstance(after, dict):
        missing = [f"{path}/{key}: missing" for key in before if key not in after]
        return missing + [d for k in before if k in after for d in differences(before[k], after[k], f"{path}/{k}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    return [] if before == after or (before != before and after != after) else [f"{path}: {before!r} → {after!r}"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, after what says where and when is taken out of the card and the recipe."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix in (".md", ".json") and path.name in ("README.md", "excise.json", "heal.json"):
                text = content.decode()
                if path.suffix == ".json":
                    text = json.dumps(plain(json.loads(text)), sort_keys=True)
                content = re.sub(r"(?m)^.*(excise run|transformers \d|Versions|versions).*$", "", text).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def compare(before: Path, after: Path) -> dict[str, list[str]]:
    """Differences by artefact."""
    found: dict[str, list[str]] = {}
    for name in MODELS:
        for job, artefacts in ARTEFACTS.items():
            for artefact in artefacts:
                a, b = before / name / artefact, after / name / artefact
                if not a.exists() or not b.exists():
                    error = (after / name / f"{job}.done").read_text()[-300:]
                    found[f"{name}/{artefact}"] = [] if a.exists() == b.exists() else [f"missing on one side: {error}"]
                    continue
                values = (digests(a), digests(b)) if a.is_dir() else (plain(json.loads(p.read_text())) for p in (a, b))
                found[f"{name}/{artefact}"] = differences(*values)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, help="folder that keeps what was made; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        tiny_folders(work / "models")
        for side in ("before", "after"):
            make(getattr(options, side).resolve(), work / side, work / "models")
        found = compare(work / "before", work / "after")
    print(
        json.dumps({"artefacts": len(found), "equal": sum(not d for d in found.values()), "different": found}, indent=1)
    )
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
