"""The paper's published numbers beside those of runs, matched by model and number of blocks removed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from excise.errors import InputError
from excise.plain import Facts
from excise.report.paper_tables import Row, cell_text, removed_text, table_text

# By the name that `--beside` takes: the file with what was published.
PUBLISHED = {"paper": "paper.json"}
# Ours of the paper's methods; states of the paper's energy are matched by their number.
METHODS = {
    "block-influence-iterative": "BI (Men et al., 2025)",
    "norm-ratio": "Norm ratio (Mistral.AI, 2026)",
    "swm-figure": "SWM (Ding et al., 2025)",
    "swm-code": "SWM (Ding et al., 2025)",
}
HEALED = " + healing"


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        source: where it stands.
        model: name of the original.
        removed: number of removed blocks, M.
        method: as it is called there; the original's own name for M = 0.
        blocks: as they are printed there.
        scores: by lm-eval's name of the benchmark.

    """

    source: str
    model: str
    removed: int
    method: str
    blocks: str
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def states(self) -> str | None:
        """The blocks as ours are written; None for the methods that name others than those of the original to remove.

        Block influence is printed with the indices of the model as it is at each step, and merged blocks in groups.
        """
        if not self.method.startswith(("CBO", "Norm ratio")):
            return None
        return removed_text(sorted(json.loads(self.blocks)))


@dataclass(frozen=True)
class Pair:
    """One method at one budget: as published, and here; None where there is none."""

    model: str
    removed: int
    paper: Published | None
    here: Row | None
    blocks: str

    def to_json(self) -> Facts:
        """Plain values."""
        paper, here = self.paper, self.here
        known = {task: cell.value for task, cell in here.cells.items()} if here else {}
        return {
            "model": self.model,
            "removed": self.removed,
            "paper": None if paper is None else {**vars(paper), "scores": dict(paper.scores)},
            "here": None if here is None else {"method": here.method, "blocks": self.blocks, "scores": known},
        }


def published(name: str = "paper") -> list[Published]:
    """The published rows of one of `PUBLISHED`."""
    text = resources.files("excise.report").joinpath(PUBLISHED[name]).read_text(encoding="utf-8")
    found = json.loads(text)
    # Of what Figure 5 shows, no scores are printed.
    scores = [dict(zip(found["tasks"], row["scores"], strict=True)) if row["scores"] else {} for row in found["rows"]]
    return [Published(**{**row, "scores": own}) for row, own in zip(found["rows"], scores, strict=True)]


def beside_rows(
    theirs: Sequence[Published], scores: Sequence[Row], removals: Sequence[tuple[int, str, str, str]]
) -> list[Pair]:
    """Rows of both, by model and budget; of the published ones those at a model and budget that are here too.

    A row here belongs to the published one that removes the same blocks, else to that of the same method. Whether it
    was healed is said in its name: what is published of pruned models is, but for Nemotron's, healed.

    Args:
        theirs: from `published`.
        scores: from `excise.report.paper_tables.benchmark_rows`.
        removals: from `excise.report.paper_tables.removal_rows`.

    Raises:
        InputError: nothing of these is published.

    """
    blocks = {(model, count, method): text for count, model, method, text in removals}
    pairs = [pair for row in scores for pair in _paired(row, theirs, blocks)]
    if not pairs:
        known = dict.fromkeys((row.model, row.removed) for row in theirs if row.removed)
        raise InputError(
            f"nothing of these folders is published; expected one of "
            f"{', '.join(f'{model} without {count}' for model, count in known)} blocks, got "
            f"{', '.join(f'{row.model} without {row.removed}' for row in scores)}"
        )
    for model, removed in dict.fromkeys((pair.model, pair.removed) for pair in pairs):
        shown = {pair.paper.source for pair in pairs if pair.paper}
        alone = [row for row in _at(theirs, model, removed) if row.source not in shown]
        pairs += [Pair(model, removed, row, None, "") for row in alone]
    return sorted(pairs, key=lambda pair: (pair.model, pair.removed))


def _at(theirs: Sequence[Published], model: str, removed: int) -> list[Published]:
    """What is published of a model, whatever its owner or folder, at a budget."""
    name = model.rpartition("/")[2].lower()
    return [row for row in theirs if (row.model.lower(), row.removed) == (name, removed)]


def _paired(row: Row, theirs: Sequence[Published], blocks: Mapping[tuple[str, int, str], str]) -> Iterator[Pair]:
    candidates = _at(theirs, row.model, row.removed)
    if not candidates:
        return
    methods = row.method.removesuffix(HEALED).split(", ")
    mine = next((blocks[key] for name in methods if (key := (row.model, row.removed, name)) in blocks), "")
    wanted = {_called(name) for name in methods}
    same = [their for their in candidates if their.removed and their.states == mine]
    named = [their for their in candidates if not their.removed or their.method in wanted]
    yield Pair(row.model, row.removed, next(iter([*same, *named]), None), row, mine)


def _called(method: str) -> str | None:
    """What the paper calls one of our methods; None where it has none such."""
    energy, colon, state = method.partition(":")
    return f"CBO: {state}" if colon and energy == "fisher" else METHODS.get(method)


def beside_table(pairs: Sequence[Pair], style: str, which: str = "both") -> str:
    """Published and own numbers side by side as text.

    Args:
        pairs: from `beside_rows`.
        style: markdown, latex or csv.
        which: "1" for scores alone, "2" for blocks alone, or "both".

    Raises:
        InputError: another style.

    """
    tasks = dict.fromkeys(task for pair in pairs if pair.paper for task in pair.paper.scores) if which != "2" else ()
    head = ["# br", "model", "paper", "here", *(text for task in tasks for text in (f"{task}: paper", "here"))]
    head += ["blocks: paper", "here"] if which != "1" else []
    rows = []
    for pair in pairs:
        paper, here = pair.paper, pair.here
        row = [str(pair.removed), pair.model, paper.method if paper else "", here.method if here else ""]
        for task in tasks:
            cell = here.cells.get(task) if here else None
            row.append(f"{paper.scores[task]:.2f}" if paper and task in paper.scores else "")
            row.append(cell_text(cell) if cell else "")
        rows.append([*row, *([paper.blocks if paper else "", pair.blocks] if which != "1" else [])])
    return table_text(head, rows, style)
