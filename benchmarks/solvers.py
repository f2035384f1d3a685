"""Time to a proved spectrum, on real coupling matrices: one JSON line per (instance, M, K) and solver.

`python -m benchmarks.solvers [--hessians FOLDER] [--quick] [--large] [--rivals-time-limit SECONDS] [--no-rivals]`

Instances: every square `.npy` in the folder (default: $EXCISE_DATA/hessians, else data/hessians), and `stretched-80`,
the 60 sublayers of the real matrix stretched to 80 (see `stretched`). Without the folder, generated matrices stand in.
`--large` runs those stretched to 96 (three draws), 128 and 160 instead, within each of `--limits` until one proves it,
and energies that refinement fitted: to SmolLM2 and the trained hybrid in benchmarks/energies (of
benchmarks/selection.py), and to larger generated truths (see `refined`), with the seconds of its rounds; where the
proof does not end, `gap` is what is left.
Gurobi's solution pool and SCIP are timed in the same run where they are installed. Times are warm: the kernels are
compiled before the first measurement, and everything else (tabu search, bound, tree, energies) is included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.choosing.refine import no_energy
from excise.choosing.search import Measured, search
from excise.errors import ExciseError
from excise.ising.energies import Energy
from excise.ising.energies.pairs import pairs
from excise.ising.problem import Problem, Removal
from excise.ising.solvers import Solver, solve, solve_all, warm_up
from excise.ising.spectrum import Spectrum

RIVALS = {"gurobi": "excise.ising.bridges.gurobi:Gurobi", "scip": "excise.ising.bridges.scip:Scip"}
ENERGIES = Path(__file__).parent / "energies"
# Of refinement: how exactly it measures, in nats, and how much.
NOISE, ANCHORS, ROUNDS, DRAWS = 0.01, 8, 8, 3
RIVALS_MOST_STATES = 20  # SCIP and Gurobi's pool do not finish with 1000


def stretched(H: NDArray[np.float64], blocks: int, seed: int = 0) -> NDArray[np.float64]:
    """A sublayer matrix [2B, 2B] stretched along depth to `blocks` blocks, as hard as the real one.

    A new sublayer's correlations interpolate those of its two nearest real sublayers of the same kind, its scale their
    scales (geometrically). Interpolation averages variance away and would make the matrix smooth and easy, so what is
    lost is put back with the correlation structure of randomly drawn real sublayers with random signs.
    """
    rng = np.random.default_rng(seed)
    n, m = len(H), 2 * blocks
    scale = np.sqrt(np.diag(H))
    real = H / np.outer(scale, scale)
    depth = np.repeat(np.linspace(0, n // 2 - 1, blocks), 2)
    lower = np.minimum(depth.astype(int), n // 2 - 2)
    near = 2 * lower + np.arange(m) % 2
    weight = depth - lower
    mix = np.zeros((m, n))
    mix[np.arange(m), near] = 1 - weight
    mix[np.arange(m), near + 2] = weight
    correlation = mix @ real @ mix.T
    lost = np.sqrt(np.maximum(0.0, 1 - np.diag(correlation)))
    drawn = np.concatenate([rng.permutation(n) for _ in range(-(-m // n))])[:m]
    signs = rng.choice([-1.0, 1.0], m)
    correlation += np.outer(lost * signs, lost * signs) * real[np.ix_(drawn, drawn)]
    scales = scale[near] ** (1 - weight) * scale[near + 2] ** weight
    return correlation * np.outer(scales, scales)


def damage(n: int, seed: int = 0) -> Energy:
    """A damage to be refined: a linear part that dominates, and few couplings of both signs.

    Linear parts spread like damages of single removals, from hundredths to tenths of a nat; neighbours couple more
    often than others.
    """
    rng = np.random.default_rng(seed)
    h = np.exp(rng.normal(-2.5, 0.8, n))
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    coupled = rng.random((n, n)) < 0.05 + 0.5 * np.exp(-distance / 3)
    J = rng.normal(0.0, 0.002, (n, n)) + coupled * rng.normal(0.0, 0.02, (n, n))
    J = np.triu(J, 1)
    return Energy(h, J + J.T)


def refined(n: int, budget: int, seed: int = 0) -> tuple[Energy, float]:
    """The energy that the refinement loop fits to a `damage` of n units, and the seconds of processor time it took."""
    truth, rng = damage(n, seed), np.random.default_rng(seed)

    def measure(removals: Sequence[Removal], _: int = 0) -> dict[Removal, Measured]:
        exact = truth.energies(removals)
        return {r: Measured(d + rng.normal(0, NOISE), NOISE) for r, d in zip(removals, exact, strict=True)}

    singles = measure([(i,) for i in range(n)])
    anchors = measure([tuple(sorted(map(int, rng.choice(n, budget, replace=False)))) for _ in range(ANCHORS)])
    started = time.process_time()
    found = search(
        measure,
        pairs({removed: measured.damage for removed, measured in singles.items()}, n),
        Problem(no_energy(n), budget),
        rounds=ROUNDS,
        known=singles | anchors,
    )
    return found.fitted.energy(), time.process_time() - started


def generated(n: int, seed: int = 0) -> NDArray[np.float64]:
    """A stand-in where no real matrix is at hand: gradients mixed by random directions of very different size."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((2 * n, n)) @ (rng.standard_normal((n, n)) * np.exp(rng.normal(0, 0.7, n)))
    return A.T @ A / len(A)


def matrices(folder: Path) -> dict[str, NDArray[np.float64]]:
    """The real matrices by file name and the stretched one, or generated ones."""
    found = {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))} if folder.is_dir() else {}
    found = {name: H for name, H in found.items() if H.ndim == 2 and H.shape[0] == H.shape[1]}
    if not found:
        print(f"no matrices in {folder}: generated ones stand in (pass --hessians FOLDER)", file=sys.stderr)
        return {"generated-30": generated(30), "generated-60": generated(60), "generated-80": generated(80)}
    sublayers = next((H for H in found.values() if len(H) == 60), None)
    if sublayers is not None:
        found["stretched-80"] = stretched(sublayers, 40)
    return found


def cases(n: int, quick: bool) -> list[tuple[int, int]]:
    """(M, K) for a matrix of n units."""
    table = {30: [(8, 20), (15, 20), (15, 1000)], 60: [(15, 20), (30, 20), (30, 1000)], 80: [(40, 20)]}
    chosen = table.get(n, [(n // 2, 20)])
    return chosen[:2] if quick else chosen


def rivals() -> Iterator[Solver]:
    """The bridges that are installed; the others are named with the reason."""
    for name, place in RIVALS.items():
        module, attribute = place.split(":")
        try:
            solver = getattr(importlib.import_module(module), attribute)()
            solver.solve(Problem(Energy(None, generated(6)), 3), 1)
            yield solver
        except (ImportError, ExciseError) as error:
            print(f"{name} left out: {error}", file=sys.stderr)


def line(instance: str, n: int, budget: Any, states: int, spectrum: Spectrum, seconds: float, **more: Any) -> None:
    """Print one result."""
    value = {
        "instance": instance,
        "units": n,
        "remove": budget,
        "states": states,
        "solver": spectrum.solver,
        "seconds": round(seconds, 3),
        "certified": spectrum.certified,
        "gap": spectrum.gap,
        "ground": spectrum[0].energy if len(spectrum) else None,
        "nodes": spectrum.evaluated,
        **more,
    }
    print(json.dumps(value), flush=True)


def large(folder: Path) -> Iterator[tuple[str, Problem, dict[str, float]]]:
    """Problems where proof takes long or ends, and those that refinement has to solve, with further figures."""
    sublayers = next((H for H in matrices(folder).values() if len(H) == 60), generated(60))
    for n, budget, draws in ((96, 32, DRAWS), (96, 48, DRAWS), (128, 32, 1), (128, 64, 1), (160, 80, 1)):
        for seed in range(draws):
            problem = Problem(Energy(None, stretched(sublayers, n // 2, seed)), budget)
            yield f"stretched-{n}-{budget}-draw-{seed}", problem, {}
    for path in sorted(ENERGIES.glob("*.safetensors")):
        energy = Energy.load(path)
        yield path.stem, Problem(energy, energy.source["budget"]), {}
    for n, budget in ((60, 15), (126, 32), (160, 40)):
        for seed in range(DRAWS):
            energy, seconds = refined(n, budget, seed)
            yield f"refined-{n}-draw-{seed}", Problem(energy, budget), {"round_seconds": round(seconds / ROUNDS, 3)}


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ["EXCISE_DATA"]) / "hessians" if "EXCISE_DATA" in os.environ else Path("data/hessians")
    parser.add_argument("--hessians", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="small K only, no rivals")
    parser.add_argument("--large", action="store_true", help="96 to 160 units and fitted energies")
    parser.add_argument("--limits", default="60", metavar="SECONDS", help="of --large, ascending: the gap at each")
    parser.add_argument(
        "--instances", default="", metavar="NAMES", help="only those of --large with one of these inside"
    )
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--rivals-time-limit", type=float, default=60.0, metavar="SECONDS")
    arguments = parser.parse_args()
    others = [] if arguments.quick or arguments.no_rivals else list(rivals())
    warm_up()
    if arguments.large:
        for instance, problem, more in large(arguments.hessians):
            if not any(name in instance for name in arguments.instances.split(",")):
                continue
            for limit in map(float, arguments.limits.split(",")):
                began = time.process_time()
                ours = solve(problem, solver="branch-and-bound", time_limit=limit)
                more |= {"limit": limit, "processor_seconds": round(time.process_time() - began, 3)}
                line(instance, len(problem.energy), problem.budget, 20, ours, ours.seconds, **more)
                if ours.certified:
                    break
        return
    for instance, H in matrices(arguments.hessians).items():
        energy = Energy(None, H)
        for budget, states in cases(len(energy), arguments.quick):
            problem = Problem(energy, budget)
            started = time.perf_counter()
            ours = solve(problem, states=states, solver="branch-and-bound")
            seconds = time.perf_counter() - started
            line(instance, len(energy), budget, states, ours, seconds)
            for solver in others if states <= RIVALS_MOST_STATES and len(energy) <= 60 else []:
                started = time.perf_counter()
                theirs = solver.solve(problem, states, time_limit=arguments.rivals_time_limit)
                took = time.perf_counter() - started
                same = [s.removed for s in theirs] == [s.removed for s in ours]
                line(instance, len(energy), budget, states, theirs, took, same_list=same, ours_faster=took / seconds)
        if len(energy) == 30 and not arguments.quick:
            started = time.perf_counter()
            spectra = solve_all(Problem(energy, 1), range(3, 28), states=1000)
            seconds = time.perf_counter() - started
            every = replace(
                spectra[15],
                certified=all(spectrum.certified for spectrum in spectra.values()),
                evaluated=sum(spectrum.evaluated for spectrum in spectra.values()),
            )
            line(instance, len(energy), "3..27", 1000, every, seconds)


if __name__ == "__main__":
    main()
