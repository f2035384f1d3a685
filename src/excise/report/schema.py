"""What is read from results that anyone may have edited: the fields that tables and page use, with their types.

Files of earlier versions lack some, later ones have more; both are fine, another type is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from excise.artefacts import check_types, inside
from excise.errors import InputError
from excise.plain import Facts, Values
from excise.settings import MOST_UNITS


class _Candidate(TypedDict, total=False):
    method: str
    removed: list[int]
    energy: float | None
    loss: float | None
    delta: float | None
    perplexity: float | None
    parameters: int
    repaired_loss: float | None
    domains: dict[str, float | None]


class _Verified(TypedDict, total=False):
    base_loss: float | None
    spearman: float | None
    candidates: list[_Candidate]


class _Damage(TypedDict, total=False):
    error: float | None
    domains: dict[str, float | None]
    pruned_domains: dict[str, float | None]


class _Tied(TypedDict):
    removed: list[int]
    delta: float | None
    worst_domain: float | None


class _Choice(TypedDict, total=False):
    base_loss: float | None
    tied: list[_Tied]


class _Speed(TypedDict, total=False):
    engine: str
    request: dict[str, int]
    predicted: dict[str, float]
    measured: dict[str, float] | None


class _Run(_Verified, total=False):
    model: str
    model_hash: str
    blocks: int
    budget: int
    asked: str
    speed: _Speed | None
    removed: list[int]
    proposed_by: list[str]
    selected_by: str
    pruned_loss: float | None
    base_perplexity: float | None
    pruned_perplexity: float | None
    checkpoint_loss: float | None
    damage: _Damage
    choice: _Choice
    parameters: int
    pruned_parameters: int
    energy: str
    spectra: dict[str, str]
    certified: dict[str, bool]
    calibration: Facts
    held_out: Facts
    settings: Facts
    provenance: Facts
    self_test: Facts
    figures: dict[str, str]
    repair: Facts | None
    race: Facts | None
    healed: Facts | None
    seconds: dict[str, float]
    checkpoint: str


class _Row(TypedDict, total=False):
    method: str
    remove: int
    removed: list[int]
    sublayers: list[str]
    merge: str | None
    energy: float | None
    loss: float | None
    delta: float | None
    interval: list[float | None] | None
    behind: float | None
    behind_interval: list[float | None] | None
    perplexity: float | None
    parameters: int
    tie: bool


class _Comparison(TypedDict, total=False):
    base_loss: float | None
    rows: list[_Row]
    skipped: dict[str, str]
    model: str
    model_hash: str
    blocks: int
    parameters: int
    energy: str
    calibration: Facts
    search: Facts
    held_out: Facts
    settings: Facts
    provenance: Facts


class _Healing(TypedDict, total=False):
    student: str
    losses: dict[str, float | None]
    domains: dict[str, dict[str, float | None]]
    steps: int
    settings: Facts
    teacher: Facts
    samples: Facts
    held_out: Facts
    curve: list[Facts]


class _Finalist(TypedDict):
    removed: list[int]
    predicted: float | None
    damage: float | None
    error: float | None
    tokens: int
    domains: NotRequired[dict[str, float | None]]


class _Round(TypedDict):
    predicted: list[float | None]
    measured: list[float | None]


class _Measured(TypedDict):
    removed: list[int]
    damage: float | None
    compared: NotRequired[float | None]


class _Refined(TypedDict):
    finalists: list[_Finalist]
    rounds: list[_Round]
    anchors: list[list[float | None]]
    measured: NotRequired[list[_Measured]]
    random_rho: NotRequired[float | None]
    low_rho: NotRequired[float | None]


class _Candidates(TypedDict):
    budgets: dict[str, _Refined]


class _Judged(TypedDict):
    name: str


class _Figure(TypedDict):
    value: float | None
    low: float | None
    high: float | None


class _PanelRow(TypedDict):
    group: str
    name: str
    variant: str
    unit: str
    higher_is_better: bool | None
    samples: int
    figures: list[_Figure | None]
    differences: list[_Figure]
    note: str


class _Said(TypedDict):
    text: str
    passed: bool | None


class _Exchange(TypedDict):
    capability: str
    prompt: str
    said: list[_Said]


class _Panel(TypedDict):
    models: list[_Judged]
    rows: list[_PanelRow]
    exchanges: list[_Exchange]


_KINDS: dict[str, type] = {
    "run": _Run,
    "verified": _Verified,
    "compare": _Comparison,
    "heal": _Healing,
    "panel": _Panel,
    "candidates": _Candidates,
}


def check(kind: str, content: Values, path: Path) -> None:
    """Refuse results whose fields hold something else, and folders named in them that are not beside them.

    Raises:
        InputError: names file and field.

    """
    if kind not in _KINDS:
        return
    check_types(_KINDS[kind], content, path)
    if kind == "candidates":
        _check_refined(content["budgets"], path)
    blocks = content.get("blocks")
    if isinstance(blocks, int) and not 0 < blocks <= MOST_UNITS:
        raise InputError(f"{path} speaks of {blocks:,} blocks; expected at least one and at most {MOST_UNITS:,}")
    if isinstance(named := content.get("checkpoint"), str):
        inside(path.parent, named, path)


def _check_refined(budgets: Mapping[str, Values], path: Path) -> None:
    for budget, facts in budgets.items():
        if not budget.isdecimal():
            raise InputError(f"{path}: expected numbers of removed blocks as the names in budgets, got '{budget}'")
        for number, each in enumerate(facts["rounds"]):
            if len(each["predicted"]) != len(each["measured"]):
                raise InputError(
                    f"{path}: round {number} at M = {budget} has {len(each['predicted'])} predictions of "
                    f"{len(each['measured'])} measured removals; expected one of each"
                )
        if any(len(pair) != 2 for pair in facts["anchors"]):
            raise InputError(f"{path}: expected anchors at M = {budget} as pairs, predicted and measured")
