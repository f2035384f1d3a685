"""The panel in a model card: capabilities in the `model-index` that the hub reads, and beside the original's."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import EvalResult

from excise.plain import Values
from excise.text import markdown_text


def place_in(panel: Values, name: str) -> int | None:
    """Which of a panel's models has a name; None for none of its results."""
    names = [str(model["name"]) for model in panel.get("models", ())]
    return names.index(name, 1) if name in names[1:] else None


def panel_entries(panel: Values, place: int) -> list[EvalResult]:
    """One entry of the model-index for each capability.

    Args:
        panel: contents of panel.json.
        place: of the model among the panel's.

    """
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=f"excise-panel-{row['name'].replace(' ', '-')}",
            dataset_name=f"excise panel, {row['name']}",
            dataset_args={"questions": row["samples"]},
            metric_type="pass_rate",
            metric_value=figure["value"],
            metric_name=f"pass rate (95 % interval {figure['low']:.3f} to {figure['high']:.3f})",
        )
        for row, figure in _capabilities(panel, place)
    ]


def panel_lines(panel: Values, place: int) -> list[str]:
    """A table of this model's capabilities with the original's beside them; arguments as for `panel_entries`."""
    rows = [
        f"| {markdown_text(row['name'])} | {_share(row['figures'][0])} | {_share(figure)} | {row['samples']} questions"
        f"{', ' + markdown_text(row['note']) if row['note'] else ''} |"
        for row, figure in _capabilities(panel, place)
    ]
    return ["## Capabilities\n", "| | original | this model | |", "|---|---|---|---|", *rows, ""] if rows else []


def _capabilities(panel: Values, place: int) -> Iterator[tuple[Values, Values]]:
    for row in panel["rows"]:
        whole = all(figure and None not in figure.values() for figure in row["figures"])
        if row["group"] == "capabilities" and not row["variant"] and whole:
            yield row, row["figures"][place]


def _share(figure: Values) -> str:
    return f"{figure['value']:.0%} [{figure['low']:.0%}, {figure['high']:.0%}]"
