"""Benchmark scores with standard errors (the paper's Figs. 4–5), perplexity, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from excise.drawing.axes import NARROW, Axis, row_frame
from excise.drawing.chart import Chart, Drawing, Entry
from excise.drawing.style import series
from excise.drawing.svg import line, rectangle, text
from excise.evaluation.scores import Metric, Model, Result
from excise.report.html import figure, table
from excise.report.material import Material
from excise.report.section import Section
from excise.text import human_bytes

SPEED_ROWS = {
    "prefill_tokens_per_second": "Reading a prompt, tokens/s",
    "decode_tokens_per_second": "Writing, tokens/s",
    "weight_bytes": "Weights",
    "cache_bytes_per_token": "KV cache per token",
    "peak_bytes": "Most memory",
}


def ordered_models(material: Material) -> list[Model]:
    """Originals first, then by the number of removed blocks, in the order in which they were judged."""
    return sorted(material.scores.models.values(), key=lambda model: len(model.removed))


def names_of(models: Sequence[Model]) -> dict[str, str]:
    """A distinct name for each model, by fingerprint."""
    names: dict[str, str] = {}
    for model in models:
        name = f"{model.label}, M = {len(model.removed)}" if model.removed else model.label
        names[model.hash] = name if name not in names.values() else f"{name} ({model.name})"
    return names


def figures(material: Material) -> dict[str, Chart]:
    """Benchmark scores of every model with standard errors."""
    every = ordered_models(material)
    results = {model.hash: material.scores.latest(model.hash, "benchmark") for model in every}
    models = [model for model in every if results[model.hash]]
    return {"benchmarks": _bars(models, results, names_of(every))} if models else {}


def _render(material: Material) -> Markup | None:
    models = ordered_models(material)
    parts = [figure(chart) for chart in figures(material).values()]
    names = names_of(models)
    texts = {model.hash: material.scores.latest(model.hash, "perplexity") for model in models}
    if any(texts.values()):
        rows = [
            (names[key], result.name, _with_error(result.score), f"{result.details['tokens']:,}")
            for key, found in texts.items()
            for result in found.values()
        ]
        parts.append(table(("model", "text", "perplexity", "tokens"), rows, "Perplexity", fold=""))
    speeds = {model.hash: found["speed"] for model in models if (found := material.scores.latest(model.hash, "speed"))}
    if speeds:
        parts.append(_speed(speeds, names))
    return Markup("").join(parts) if parts else None


def _bars(models: Sequence[Model], results: Mapping[str, Mapping[str, Result]], names: Mapping[str, str]) -> Chart:
    tasks = list(dict.fromkeys(task for model in models for task in results[model.hash]))
    colours = {model.hash: series(k)[0] for k, model in enumerate(models)}

    def draw(width: int) -> Drawing:
        narrow, bar, gap = width <= NARROW, 20, 44
        left = 12 if narrow else 210
        bottom = 12 + sum(gap + bar * sum(task in results[m.hash] for m in models) for task in tasks)
        x, top = Axis(0.0, 1.0, left, width - 60), 12.0
        parts = row_frame(x, bottom, "score")
        for task in tasks:
            shown = [results[m.hash][task] for m in models if task in results[m.hash]]
            metric = shown[0].headline.partition(",")[0]
            name_at = (left, top + 14, "start") if narrow else (left - 12, top + 34, "end")
            parts.append(text(name_at[0], name_at[1], f"{task} ({metric})", anchor=name_at[2], style="name"))
            at = top + 22
            for result in shown:
                parts += _bar(x, at, bar - 4, result, names[result.model], colours[result.model])
                at += bar
            top += gap + bar * len(shown)
        return Drawing(bottom + 50, parts)

    rows = [
        (task, names[m.hash], r.headline, _with_error(r.score), f"{r.details['samples']:,}", str(r.details["shots"]))
        for task in tasks
        for m in models
        if (r := results[m.hash].get(task))
    ]
    versions = sorted({str(r.settings.get("lm_eval")) for m in models for r in results[m.hash].values()})
    return Chart(
        f"Benchmark scores of {len(models)} models on {', '.join(tasks)}",
        draw,
        tuple(Entry(names[m.hash], colours[m.hash]) for m in models),
        f"Whiskers are one standard error. lm-eval {', '.join(versions)}.",
        ("task", "model", "metric", "score ± standard error", "samples", "shots"),
        tuple(rows),
    )


def _bar(x: Axis, at: float, thick: float, result: Result, name: str, colour: str) -> list[Markup]:
    metric, error = result.score, result.score.stderr or 0.0
    tip = f"{name}, {result.name}: {_with_error(metric)}"
    parts = [rectangle(x(0), at, max(1.0, x(metric.value) - x(0)), thick, colour, tip)]
    low, high, middle = max(0.0, metric.value - error), min(1.0, metric.value + error), at + thick / 2
    if error:
        parts.append(line(x(low), middle, x(high), middle, "whisker"))
    parts.append(text(x(high) + 6, middle + 4, f"{metric.value:.3f}", anchor="start", style="value"))
    return parts


def _speed(speeds: dict[str, Result], names: dict[str, str]) -> Markup:
    rows = [
        (title, *(_amount(name, result.metrics[name]) for result in speeds.values()))
        for name, title in SPEED_ROWS.items()
    ]
    devices = sorted(
        {f"{r.settings['device']}, {r.details['dtype']}, batch {r.settings['batch']}" for r in speeds.values()}
    )
    caption = f"Speed and memory ({'; '.join(devices)}; medians of three)"
    return table(("", *(names[key] for key in speeds)), rows, caption, fold="")


def _amount(name: str, metric: Metric) -> str:
    return human_bytes(int(metric.value)) if "bytes" in name else f"{metric.value:,.1f}"


def _with_error(metric: Metric) -> str:
    digits = 2 if metric.value >= 10 else 4
    error = "" if metric.stderr is None else f" ± {metric.stderr:,.{digits}f}"
    return f"{metric.value:,.{digits}f}{error}"


SECTION = Section(
    "benchmarks",
    "Benchmarks",
    _render,
    ("excise evaluate DIR --with-original --tasks paper --speed", "benchmark scores, speed and memory"),
    figures,
)
