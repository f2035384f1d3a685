"""Scores for the terminal."""

from __future__ import annotations

from rich.table import Table

from excise.evaluation.scores import Metric, Scores
from excise.text import human_bytes


def scores_table(scores: Scores) -> Table:
    """One row a result: model, what was measured, the number with its standard error, on how much."""
    table = Table("model", "measured", "metric", "value", "± error", "on")
    for result in scores.results:
        model = scores.models[result.model]
        shown = [result.headline] if result.kind == "benchmark" else list(result.metrics)
        for name in shown:
            metric = result.metrics[name]
            error = "" if metric.stderr is None else f"{metric.stderr:.4f}"
            on = (
                f"{result.details['samples']:,} samples"
                if result.kind == "benchmark"
                else f"{result.details['tokens']:,} tokens"
                if result.kind == "perplexity"
                else str(result.settings["device"])
            )
            table.add_row(model.label, result.name, name.partition(",")[0], _value(name, metric), error, on)
    return table


def _value(name: str, metric: Metric) -> str:
    if name.endswith("bytes"):
        return human_bytes(int(metric.value))
    return f"{metric.value:,.0f}" if metric.value >= 1000 else f"{metric.value:.4f}"
