"""The paper's experiment in small: MoE-only removal from a trained hybrid, ground state against excited states.

    python -m benchmarks.hybrid

The model is examples/tiny-hybrid, a Nemotron-H of 17 blocks, 8 of them mixtures of experts. Calibration and held-out
windows are of text that its training never saw, and are disjoint. Of the paper's energy, alone and with the linear
term, the 20 lowest states are measured; of MoE-only removal everything there is, which gives each its place among all.
Beside them stands what refinement picks at its default effort.

Prints JSON, writes it to benchmarks/results/hybrid.json, and draws docs/figures/hybrid.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.figures import save_figure
from excise.artefacts import write_json
from excise.artefacts.provenance import provenance
from excise.choosing.brief import Brief
from excise.choosing.objectives import parse_objective
from excise.choosing.refine import refine
from excise.choosing.states import block_energies
from excise.context import Context
from excise.data import Samples, split_samples
from excise.ising.energies import Energy
from excise.ising.solvers import solve
from excise.measuring.measure import Measurements, measure
from excise.measuring.score import score
from excise.models.loading import load
from excise.settings import DEFAULT_EFFORT
from excise.store import Store

PLACE = Path("examples/tiny-hybrid")
BUDGETS, STATES, MOST_MEASURED = (2, 3), 20, 100
DRAWN: dict[str, Any] = {"samples": 128, "held_out": 64, "tokens": 64, "seed": 0, "loss_on": "all"}
SHOWN = {"fisher": ("o-", "#1f5fa8", "paper's energy"), "fisher+linear": ("s-", "#c4572b", "with linear term")}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hybrid.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/hybrid.png"))
    parser.add_argument("--kinds", default="moe,all", help="what may be removed, in turn")
    parser.add_argument("--work", type=Path, default=Path("runs/hybrid"), help="measurements, kept and found again")
    options = parser.parse_args()
    loaded = load(str(PLACE / "model"))
    stack = loaded.stack
    calibration, held_out = split_samples(str(PLACE / "held_out.txt"), loaded.tokenizer, **DRAWN)
    context = Context(loaded, Store(options.work))
    energies = block_energies(score(context, calibration))
    singles = measure(context, held_out, [(), *((i,) for i in range(len(stack.blocks)))])
    cases = []
    for kinds, budget in itertools.product(options.kinds.split(","), BUDGETS):
        protected = [block.index for block in stack.blocks if kinds != "all" and block.kind != kinds]
        cases.append(_case(context, calibration, held_out, energies, Brief.on(stack, budget, protected=protected)))
        cases[-1] = {"kinds": kinds, "budget": budget, **cases[-1]}
        print(json.dumps({key: value for key, value in cases[-1].items() if key != "measured"}), flush=True)
    facts = {
        "kinds": [block.kind for block in stack.blocks],
        "base_loss": singles.loss(),
        "singles": [singles.loss((i,)) - singles.loss() for i in range(len(stack.blocks))],
        "calibration": calibration.describe(),
        "held_out": held_out.describe(),
        "cases": cases,
        "versions": provenance()["versions"],
    }
    write_json(options.out, facts)
    save_figure(_figure(cases), options.figure)


def _case(
    context: Context, calibration: Samples, held_out: Samples, energies: Mapping[str, Energy], brief: Brief
) -> dict[str, Any]:
    """Spectra, refinement's choice and their measured rises of the held-out loss, for one budget."""
    stack, budget = context.stack, brief.budget
    spectra = {name: solve(brief.problem(stack, energy), states=STATES) for name, energy in energies.items()}
    objective = parse_objective("kl", calibration)
    refined = refine(context, objective, brief, tokens=DEFAULT_EFFORT * calibration.tokens)
    free = [i for i in range(len(stack.blocks)) if i not in brief.protected]
    complete = math.comb(len(free), budget) <= MOST_MEASURED
    everything = list(itertools.combinations(free, budget)) if complete else []
    wanted = [refined.removed, *(state.removed for spectrum in spectra.values() for state in spectrum)]
    measured = measure(context, held_out, [(), *wanted, *everything])
    ranked = sorted(measured.removals[1:], key=measured.loss)
    return {
        "removals": math.comb(len(free), budget),
        "all_measured": complete,
        "best": _outcome(measured, ranked, ranked[0]),
        "refined": {**_outcome(measured, ranked, refined.removed), "forward_tokens": refined.forward_tokens},
        "spectra": {
            name: {
                "certified": spectrum.certified,
                "spearman": float(
                    spearmanr([s.energy for s in spectrum], [measured.loss(s.removed) for s in spectrum]).statistic
                ),
                "states": [{"energy": s.energy, **_outcome(measured, ranked, s.removed)} for s in spectrum],
            }
            for name, spectrum in spectra.items()
        },
        "spearman_over_all": {
            name: float(spearmanr(energy.energies(everything), [measured.loss(r) for r in everything]).statistic)
            for name, energy in energies.items()
            if complete
        },
        "measured": [_outcome(measured, ranked, removed) for removed in ranked],
    }


def _outcome(measured: Measurements, ranked: Sequence[tuple[int, ...]], removed: tuple[int, ...]) -> dict[str, Any]:
    """Rise of the loss, nats/token, and place (from 1) among all that were measured."""
    rise = measured.loss(removed) - measured.loss()
    return {"removed": list(removed), "delta": rise, "place": ranked.index(removed) + 1}


def _figure(cases: Sequence[Mapping[str, Any]]) -> Figure:
    rows = len(cases) // len(BUDGETS)
    figure = Figure(figsize=(9.0, 3.1 * rows), layout="constrained")
    for axes, case in zip(figure.subplots(rows, len(BUDGETS), squeeze=False).flat, cases, strict=True):
        _draw(axes, case)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _draw(axes: Axes, case: Mapping[str, Any]) -> None:
    """Measured rise of the loss for each state of both spectra, in order of energy."""
    for name, spectrum in case["spectra"].items():
        style, colour, label = SHOWN[name]
        rises = [state["delta"] for state in spectrum["states"]]
        axes.plot(range(len(rises)), rises, style, color=colour, ms=3.5, lw=0.8, label=label)
    axes.axhline(case["refined"]["delta"], color="#1d8348", lw=1.2, label="refined")
    axes.axhline(case["best"]["delta"], color="#8a8a8a", lw=1.0, ls=":", label="best measured")
    what = "all kinds" if case["kinds"] == "all" else f"{case['kinds']} only"
    axes.set_title(f"{what}, M = {case['budget']} of {case['removals']} removals", fontsize=10)
    axes.set_xlabel("state k (0: ground state)")
    axes.set_ylabel("Δ loss (nats/token)")
    axes.set_yscale("log")
    axes.set_xticks(range(0, STATES, 4))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
