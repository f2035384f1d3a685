"""Speed: how many times as fast the result is, as the blocks' times predicted it and as it was measured."""

from __future__ import annotations

from markupsafe import Markup

from excise.plain import Values
from excise.report.html import table
from excise.report.material import Material
from excise.report.section import Section

PARTS = {"request": "whole request", "prefill": "prefill", "decode": "a token decoded"}


def _render(material: Material) -> Markup | None:
    timed = [run for run in material.runs if run.get("speed")]
    return Markup("").join(map(_table, timed)) if timed else None


def _table(run: Values) -> Markup:
    speed = run["speed"]
    request, predicted, measured = (speed.get(key) or {} for key in ("request", "predicted", "measured"))
    rows = [
        (title, f"{predicted[part]:.2f}", *_beside(predicted[part], measured.get(part)))
        for part, title in PARTS.items()
        if part in predicted
    ]
    caption = (
        f"Times as fast as the original (M = {run.get('budget', '?')}, asked for: {run.get('asked', '')}); "
        f"{request.get('prompt_tokens', '?')} tokens read, {request.get('new_tokens', '?')} written; medians of turns "
        f"in {speed.get('engine', 'transformers')}"
    )
    return table(("", "predicted", "measured", "predicted against measured"), rows, caption, fold="")


def _beside(predicted: float, measured: float | None) -> tuple[str, str]:
    return (f"{measured:.2f}", f"{predicted / measured - 1:+.1%}") if measured else ("not measured", "")


SECTION = Section(
    "speed",
    "Speed",
    _render,
    ("excise run MODEL --speedup 1.5 --out DIR", "speed as predicted from times of blocks, and as measured"),
)
