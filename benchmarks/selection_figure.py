"""Draw damage against cost: refinement at growing effort, and what the other methods reach with their one cost.

    python -m benchmarks.selection_figure benchmarks/results/selection.json docs/figures/damage_by_effort.png

Reads the figures of selection without repair, joined by the benchmark as it was at commit 5734a28; draws seed 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import LIGHT, save_figure
from excise.artefacts import read_json

# Rivals within reach of the axes, in the order of the legend.
RIVALS = {
    "block-influence": ("o", "block influence"),
    "block-influence-iterative": ("v", "block influence, iterative"),
    "norm-ratio": ("^", "norm ratio"),
    "sleb": ("s", "SLEB"),
    "evopress-scaled-down": ("D", "EvoPress, scaled down"),
}
TEXTS = {"wikitext": "WikiText-2", "chats": "other chats"}


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    found = [facts for facts in read_json(options.results) if not facts["seed"]]
    curves = sorted((facts for facts in found if "curve" in facts), key=lambda facts: int(facts["remove"]))
    figure = Figure(figsize=(3.4 * len(curves), 6.0), layout="constrained")
    axes = figure.subplots(len(TEXTS), len(curves), sharex=True, squeeze=False)
    for row, (text, title) in zip(axes, TEXTS.items(), strict=True):
        rivals = [r for facts in found if facts.get("text") == text for r in facts["rows"]]
        for place, curve in zip(row, curves, strict=True):
            _draw(place, curve, text, [r for r in rivals if r["remove"] == curve["remove"]])
            place.set_title(f"M = {curve['remove']}, {title}", fontsize=10)
    for place in axes[-1]:
        place.set_xlabel("cost (tokens through the intact model)")
    for place in axes[:, 0]:
        place.set_ylabel("Δ loss (nats/token)")
    drawn = [pair for place in axes.flat for pair in zip(*place.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in drawn}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, options.out)


def _draw(axes: Axes, curve: dict[str, Any], text: str, rivals: list[dict[str, Any]]) -> None:
    points = curve["curve"]
    axes.plot(
        [p["tokens"] for p in points], [p[text] for p in points], "-", color=LIGHT["ours"], label="refined, by effort"
    )
    for point in points:
        axes.annotate(f"{point['effort']:g}", (point["tokens"], point[text]), color=LIGHT["ours"], fontsize=8)
    best = min(p[text] for p in points)
    for method, (marker, label) in RIVALS.items():
        for row in (r for r in rivals if r["method"] == method and r["delta"] < 2 * best):
            cost = row["forward_tokens"] + row["backward_tokens"]
            low, high = (abs(end - row["delta"]) for end in row["interval"])
            axes.errorbar(cost, row["delta"], [[low], [high]], fmt=marker, color="#c4572b", label=label, capsize=2)
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
