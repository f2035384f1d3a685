"""The page's figures as PNG and SVG files, for papers and talks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from excise.choosing.verify import Candidate, Verified
from excise.ising.energies import Energy
from excise.report import figures
from excise.report.material import Material
from excise.report.sections.benchmarks import names_of, ordered_models
from excise.report.sections.couplings import shown_energy
from excise.report.sections.damage import damage_rows
from excise.report.sections.healing import curves

FORMATS = ("png", "svg")
COLOURS = ("#1f5fa8", "#c4572b", "#1d8348", "#7d4a9e", "#a37c00", "#12808f", "#b5256b", "#75513f")
MARKERS = "osD^v"


def write_static_figures(material: Material) -> list[Path]:
    """Draw every figure that the folder has data for into its `figures`.

    Args:
        material: from `excise.report.material.gather`.

    Returns:
        The files, a PNG and an SVG of each.

    """
    written = []
    for name, figure in _figures(material):
        for suffix in FORMATS:
            path = material.folder / "figures" / f"{name}.{suffix}"
            figures.save_figure(figure, path)
            written.append(path)
    return written


def _figures(material: Material) -> Iterator[tuple[str, Figure]]:
    run = material.run
    if shown := shown_energy(material):
        yield "couplings", figures.couplings(shown[1])
    if run:
        candidates = tuple(Candidate(**{**c, "removed": tuple(c["removed"])}) for c in run["candidates"])
        chosen = next(c for c in candidates if list(c.removed) == run["removed"])
        verified = Verified(run["base_loss"], candidates, run["spearman"], 0.0)
        named = Energy(None, [[0.0]], source={"kind": run["energy"]})  # the figure shows its name only
        yield "energy_and_loss", figures.energy_and_loss(named, verified, chosen)
        spectrum = material.spectra.get(run["energy"], {}).get(run["budget"])
        if spectrum is not None:
            yield "removal_frequency", figures.removal_frequency(spectrum, chosen)
    if len({row["remove"] for row in damage_rows(material)}) > 1:
        yield "damage", damage(material)
    if any(result.kind == "benchmark" for result in material.scores.results):
        yield "benchmarks", benchmarks(material)
    if curves(material.healing):
        yield "healing", healing(material)


def damage(material: Material) -> Figure:
    """Measured damage against the budget, a line a method, with 95 % intervals where they are known."""
    rows = damage_rows(material)
    figure = Figure(figsize=(7.0, 4.6))
    axes = figure.subplots()
    for k, method in enumerate(dict.fromkeys(str(row["method"]) for row in rows)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["remove"])
        at, deltas = [row["remove"] for row in own], [row["delta"] for row in own]
        ends = [row.get("interval") or (row["delta"], row["delta"]) for row in own]
        below = [max(0.0, delta - low) for delta, (low, _) in zip(deltas, ends, strict=True)]
        above = [max(0.0, high - delta) for delta, (_, high) in zip(deltas, ends, strict=True)]
        style = f"{MARKERS[k % len(MARKERS)]}-"
        axes.errorbar(
            at, deltas, [below, above], fmt=style, color=COLOURS[k % len(COLOURS)], ms=4, lw=1.2, label=method
        )
    axes.set_xlabel("blocks removed, M")
    axes.set_ylabel("Δ loss on held-out samples (nats/token)")
    axes.set_title("Damage against budget, 95 % intervals")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def benchmarks(material: Material) -> Figure:
    """Benchmark scores of every model with standard errors (the paper's Figs. 4–5)."""
    models = [m for m in ordered_models(material) if material.scores.latest(m.hash, "benchmark")]
    results = {model.hash: material.scores.latest(model.hash, "benchmark") for model in models}
    tasks = list(dict.fromkeys(task for found in results.values() for task in found))
    names = names_of(models)
    figure = Figure(figsize=(max(5.0, 0.6 + 0.42 * len(tasks) * len(models)), 4.2))
    axes = figure.subplots()
    width = 0.8 / len(models)
    for k, model in enumerate(models):
        shown = [(i, results[model.hash][task].score) for i, task in enumerate(tasks) if task in results[model.hash]]
        places = [i + (k - (len(models) - 1) / 2) * width for i, _ in shown]
        errors = [score.stderr or 0.0 for _, score in shown]
        heights = [score.value for _, score in shown]
        colour = COLOURS[k % len(COLOURS)]
        axes.bar(places, heights, width * 0.92, yerr=errors, color=colour, capsize=2, label=names[model.hash])
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set_ylabel("score, ± standard error")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def healing(material: Material) -> Figure:
    """Distillation loss by step, running means."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for k, (name, points) in enumerate(curves(material.healing).items()):
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=COLOURS[k % len(COLOURS)], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("distillation loss (nats/token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
