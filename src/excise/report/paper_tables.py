"""The paper's two tables from folders of runs: scores of methods at each budget, and the blocks that each removes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from excise.errors import InputError
from excise.evaluation.scores import Metric, Result
from excise.plain import Plain
from excise.report.material import Material
from excise.report.words import Z
from excise.text import markdown_text, one_line, ranges, spreadsheet_text

FORMATS = ("markdown", "latex", "csv")
DAMAGE = "Δ loss"
LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "Δ": r"$\Delta$", "±": r"$\pm$", "−": "$-$", "–": "--"}


@dataclass(frozen=True)
class Cell:
    """A number of Table 1.

    Attributes:
        value: accuracy, perplexity or damage.
        error: its standard error; None where it is not known.
        higher_is_better: direction.
        interval: 95 % interval of the value, where that is known instead of an error.
        behind: interval of the distance to the best at this budget, where it was measured on the same samples (paired).

    """

    value: float
    error: float | None = None
    higher_is_better: bool = True
    interval: tuple[float, float] | None = None
    behind: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        model: name of the original.
        removed: number of removed blocks, M.
        method: name of the method; the original's own name for M = 0.
        cells: by column.

    """

    model: str
    removed: int
    method: str
    cells: Mapping[str, Cell] = field(default_factory=dict)


def benchmark_rows(found: Sequence[Material], metrics: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of Table 1: by model and budget, originals first.

    Columns are benchmarks, perplexities, and the damage of compare.json (or, without one, of the runs' candidates).

    Args:
        found: what folders hold.
        metrics: which metric of a task to show, instead of the one that stands for it.

    Raises:
        InputError: a metric that a task does not have, or nothing to show.

    """
    rows: dict[tuple[str, int, str], dict[str, Cell]] = {}
    owners: dict[tuple[str, int, str], str] = {}
    for material in found:
        for model in material.scores.models.values():
            name = model.original or (material.model if model.removed else model.name)
            key = (name, len(model.removed), model.label if model.removed else name)
            # Two models by the same method.
            if owners.setdefault(key, model.hash) != model.hash:
                key = (*key[:2], f"{key[2]} ({model.name})")
            cells = rows.setdefault(key, {})
            for kind in ("benchmark", "perplexity"):
                for task, result in material.scores.latest(model.hash, kind).items():
                    column = task if kind == "benchmark" else f"ppl {task}"
                    metric = _metric(result, (metrics or {}).get(task))
                    cells[column] = Cell(metric.value, metric.stderr, metric.higher_is_better)
        for removed, method, cell in _damages(material):
            rows.setdefault((material.model, removed, method), {})[DAMAGE] = cell
    if not rows:
        raise InputError("these folders hold neither scores nor measured damage; `excise evaluate` adds scores")
    order = sorted(rows, key=lambda key: (key[0], key[1]))
    return [Row(*key, cells=rows[key]) for key in order]


def _metric(result: Result, wanted: str | None) -> Metric:
    if wanted is None:
        return result.score
    matching = [metric for name, metric in result.metrics.items() if wanted in (name, name.partition(",")[0])]
    if not matching:
        raise InputError(f"{result.name} has no metric '{wanted}'; it has {', '.join(result.metrics)}")
    return matching[0]


def _damages(material: Material) -> Iterator[tuple[int, str, Cell]]:
    if material.compare:
        for row in material.compare["rows"]:
            if _finite(row["delta"]):
                interval, behind = (
                    tuple(row[key]) if row.get(key) else None for key in ("interval", "behind_interval")
                )
                yield row["remove"], row["method"], Cell(row["delta"], None, False, interval, behind)
        return
    for budget, every in material.measured.items():
        for measured in every:
            for method in measured.methods:
                if math.isfinite(measured.delta):
                    yield budget, method, Cell(measured.delta, None, False)


def _finite(value: Plain) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def best_of(cells: Mapping[str, Cell]) -> str | None:
    """Which of several cells is best beyond the error; None where two are not told apart, or errors are not known.

    Paired intervals decide where there are any, else the difference must exceed 1.96 standard errors of a difference
    between independent samples: cautious where, as here, the samples are the same.

    Args:
        cells: of one column at one budget, by method.

    """
    if len(cells) < 2:
        return None
    first = max(cells, key=lambda name: cells[name].value if cells[name].higher_is_better else -cells[name].value)
    others = [cell for name, cell in cells.items() if name != first]
    return first if all(_apart(cells[first], cell) for cell in others) else None


def _apart(best: Cell, other: Cell) -> bool:
    if other.behind is not None:
        return other.behind[0] > 0
    if best.error is None or other.error is None:
        return False
    return abs(best.value - other.value) > Z * math.hypot(best.error, other.error)


def removal_rows(found: Sequence[Material], *, random: bool = False) -> list[tuple[int, str, str, str]]:
    """Rows of Table 2: number of blocks, model, method, blocks removed (merged runs in brackets).

    Args:
        found: what folders hold.
        random: also the random removals measured as control.

    Raises:
        InputError: nothing to show.

    """
    rows: dict[tuple[str, int, str, str], None] = {}
    for material in found:
        for count, method, blocks in _removals(material):
            if blocks and (random or not method.startswith("random")):
                rows[material.model, count, method, blocks] = None
    if not rows:
        raise InputError("these folders say nothing of removed blocks; expected run.json, compare.json or scores.json")
    ordered = sorted(rows, key=lambda key: (key[0], key[1]))
    return [(count, model, method, blocks) for model, count, method, blocks in ordered]


def _removals(material: Material) -> Iterator[tuple[int, str, str]]:
    """Number of blocks, method, and what it removes."""
    for row in material.compare.get("rows", ()):
        blocks = _merged(row["removed"]) if row.get("merge") else removed_text(row["removed"])
        yield row["remove"], row["method"], ", ".join(row.get("sublayers", ())) or blocks
    for every in material.measured.values():
        for measured in every:
            for method in measured.methods:
                yield len(measured.removed), method, removed_text(measured.removed)
    for model in material.scores.models.values():
        if model.method and ", " not in model.method:
            yield len(model.removed), model.method, removed_text(model.removed)


def removed_text(removed: Sequence[int]) -> str:
    """Blocks as the tables write them, such as `3, 12-17`."""
    return ranges(removed).replace(",", ", ")


def _merged(removed: Sequence[int]) -> str:
    from excise.surgery.merge import runs_of

    groups = [sorted((run.kept, *run.removed)) for run in runs_of(removed)]
    return ", ".join(f"[{removed_text(group)}]" for group in groups)


def benchmark_table(rows: Sequence[Row], style: str) -> str:
    """Table 1 as text; the best of a column at a budget is bold (in CSV: named in a column) if it is beyond the error.

    Args:
        rows: from `benchmark_rows`.
        style: markdown, latex or csv.

    Raises:
        InputError: another style.

    """
    _check(style)
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    marked = {(row.model, row.removed, column): _best(rows, row, column) for row in rows for column in columns}
    if style == "csv":
        head = ["model", "M", "method", *(f"{c}{suffix}" for c in columns for suffix in ("", " stderr", " best"))]
        body = [
            [row.model, row.removed, row.method, *(x for c in columns for x in _numbers(row, c, marked))]
            for row in rows
        ]
        return _csv(head, body)
    head = ["# br", "model", "method", *columns]
    named = [[str(row.removed), row.model, row.method] for row in rows]
    numbers = [[_text(row, column, marked, style) for column in columns] for row in rows]
    if style == "latex":
        return _latex(head, [[*map(_tex, names), *rest] for names, rest in zip(named, numbers, strict=True)])
    head = [*head[:3], *map(markdown_text, columns)]
    return _markdown(head, [[*map(markdown_text, names), *rest] for names, rest in zip(named, numbers, strict=True)])


def _best(rows: Sequence[Row], row: Row, column: str) -> str | None:
    peers = [other for other in rows if (other.model, other.removed) == (row.model, row.removed)]
    return best_of({other.method: other.cells[column] for other in peers if column in other.cells})


def _numbers(row: Row, column: str, marked: Mapping[tuple[str, int, str], str | None]) -> list[Any]:
    cell = row.cells.get(column)
    if cell is None:
        return ["", "", ""]
    best = marked[row.model, row.removed, column] == row.method
    return [f"{cell.value:.6g}", "" if cell.error is None else f"{cell.error:.6g}", int(best)]


def _text(row: Row, column: str, marked: Mapping[tuple[str, int, str], str | None], style: str) -> str:
    cell = row.cells.get(column)
    if cell is None:
        return ""
    text = cell_text(cell)
    bold = marked[row.model, row.removed, column] == row.method
    if style == "latex":
        return f"\\textbf{{{_tex(text)}}}" if bold else _tex(text)
    return f"**{text}**" if bold else text


def cell_text(cell: Cell) -> str:
    """A number with its error or interval."""
    digits = 2 if cell.value >= 10 else 3
    text = f"{cell.value:.{digits}f}"
    if cell.error is not None:
        text += f" ± {cell.error:.{digits}f}"
    elif cell.interval is not None:
        text += f" [{cell.interval[0]:.{digits}f}, {cell.interval[1]:.{digits}f}]"
    return text.replace("-", "−")


def removal_table(rows: Sequence[tuple[int, str, str, str]], style: str) -> str:
    """Table 2 as text.

    Args:
        rows: from `removal_rows`.
        style: markdown, latex or csv.

    Raises:
        InputError: another style.

    """
    return table_text(["# br", "model", "method", "blocks removed"], [[str(n), *rest] for n, *rest in rows], style)


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    """A table of texts, which come from files.

    Args:
        head: one text a column.
        rows: of as many.
        style: markdown, latex or csv.

    Raises:
        InputError: another style.

    """
    _check(style)
    if style == "latex":
        return _latex(head, [list(map(_tex, row)) for row in rows])
    if style == "csv":
        return _csv(head, rows)
    return _markdown(head, [list(map(markdown_text, row)) for row in rows])


def _check(style: str) -> None:
    if style not in FORMATS:
        raise InputError(f"expected --format in {', '.join(FORMATS)}, got '{style}'")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what of its cells comes from files went through `markdown_text`."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows))


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with booktabs rules; the cells of `rows` are LaTeX already."""

    def line(row: Sequence[str]) -> str:
        return " & ".join(row) + r" \\"

    top, body = line([_tex(cell) for cell in head]), "\n".join(map(line, rows))
    columns = "r" + "l" * (len(head) - 1)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{top}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in one_line(text))


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    cells = ([spreadsheet_text(cell) if isinstance(cell, str) else cell for cell in row] for row in (head, *rows))
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue()
