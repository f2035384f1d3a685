"""The recipe of a checkpoint, excise.json: what was removed of the first original, and every step on the way.

A checkpoint may be pruned, healed and pruned again. Its recipe always speaks of the first original, by whose indices
blocks are named; what each earlier step wrote stands in `history`, and what the last one measured beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from excise.artefacts import RECIPE, check_types, read_json
from excise.errors import InputError
from excise.plain import Facts, Values

HISTORY = "history"
REPAIRS = ("repair", "repair_left_out")


def read_recipe(source: str | Path) -> Facts:
    """Read what a checkpoint says of its making.

    Args:
        source: its folder, with excise.json; or a `.gguf` file, whose metadata tell what was removed.

    Returns:
        The recipe; empty where there is none.

    Raises:
        InputError: excise.json is damaged.

    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from excise.surgery.gguf import gguf_recipe

        return gguf_recipe(path)
    if not (path / RECIPE).is_file():
        return {}
    recipe = read_json(path / RECIPE)
    if not isinstance(recipe, dict):
        raise InputError(f"{path / RECIPE} is no recipe of excise; delete it, and its checkpoint counts as an original")
    return recipe


class _Recipe(TypedDict, total=False):
    """What is computed from or shown, of a recipe that anyone may have edited."""

    original: str | None
    source: str | None
    model_type: str | None
    removed: list[int]
    original_blocks: list[int]
    zeroed_sublayers: list[str]
    parameters: dict[str, int | None] | None
    bytes: dict[str, int | None] | None
    merge: Facts
    repair: Facts
    healing: Facts
    readers: Facts
    left_out: dict[str, str]
    history: list[Facts]
    proposed_by: str | None
    energy: float | None
    base_loss: float | None
    pruned_loss: float | None
    repaired_loss: float | None
    data: Facts
    versions: Facts
    command: str | None


def composed(earlier: Values, step: Values) -> Facts:
    """Return the recipe of a checkpoint that was made in another step from one that has a recipe.

    Args:
        earlier: recipe of what the step started from; empty where that is an original.
        step: recipe of the step alone, blocks named by the indices of what it started from.

    Returns:
        `step`, with blocks and sublayers named as in the first original; `removed`, `original_blocks` and
        `zeroed_sublayers` of all steps together; `original`, and sizes before, of the first; `source`, from which this
        step started; and `history`, the recipes of all steps before, the first at first.

    Examples:
        >>> once = {"original": "org/model", "removed": [1, 4], "original_blocks": [0, 2, 3, 5]}
        >>> twice = composed(once, {"original": "once", "removed": [2], "original_blocks": [0, 1, 3]})
        >>> twice["removed"], twice["original_blocks"], twice["original"]
        ([1, 3, 4], [0, 2, 5], 'org/model')

    """
    if not earlier:
        return dict(step)
    blocks = len(step["removed"]) + len(step["original_blocks"])
    if not _fits(earlier, blocks):
        warnings.warn(
            f"the {RECIPE} beside the weights does not belong to a model of {blocks} blocks; it is left out, and this "
            f"model counts as an original",
            stacklevel=3,
        )
        return dict(step)
    first = earlier["original_blocks"]
    kept = [first[i] for i in step["original_blocks"]]
    own = {key: value for key, value in step.items() if key != "zeroed_sublayers"} | _renumbered(step, first)
    zeroed = {name for name in earlier.get("zeroed_sublayers", ()) if not _is_refilled(name, own)}
    zeroed |= {_renamed(name, first) for name in step.get("zeroed_sublayers", ())}
    silent = sorted((name for name in zeroed if _block(name) in kept), key=lambda name: (_block(name), name))
    return {
        **own,
        "original": earlier.get("original"),
        "source": step.get("original"),
        "removed": sorted({*earlier["removed"], *(first[i] for i in step["removed"])}),
        "original_blocks": kept,
        **({"zeroed_sublayers": silent} if silent else {}),
        **{key: _since(earlier.get(key), step[key]) for key in ("parameters", "bytes") if key in step},
        HISTORY: [*earlier.get(HISTORY, ()), {key: value for key, value in earlier.items() if key != HISTORY}],
    }


def _fits(recipe: Values, blocks: int) -> bool:
    """Whether a recipe, which anyone may have written, speaks of a model of so many blocks."""
    try:
        check_types(_Recipe, recipe, RECIPE)
    except InputError:
        return False
    kept, removed = recipe.get("original_blocks"), recipe.get("removed")
    if not isinstance(kept, list) or not isinstance(removed, list) or len(kept) != blocks:
        return False
    return sorted(kept + removed, key=str) == sorted(range(len(kept) + len(removed)), key=str)


def _since(earlier: Values | None, step: Values) -> Facts:
    """Sizes after the step and before the first; None where the first did not say."""
    return {**step, "before": earlier.get("before") if earlier else None}


def _renumbered(step: Values, first: Sequence[int]) -> Facts:
    """What a step says of single blocks, by the first original's indices."""
    facts: Facts = {}
    if merge := step.get("merge"):
        runs = [{"kept": first[run["kept"]], "removed": _all(run["removed"], first)} for run in merge["runs"]]
        facts["merge"] = {**merge, "runs": runs}
    for key in (key for key in REPAIRS if step.get(key)):
        steps = [{**s, "block": first[s["block"]], "run": _all(s["run"], first)} for s in step[key]["steps"]]
        facts[key] = {**step[key], "removed": _all(step[key]["removed"], first), "steps": steps}
    return facts


def _is_refilled(sublayer: str, step: Values) -> bool:
    """Whether a step put weights into a sublayer that had been set to 0."""
    merged = {run["kept"] for run in (step.get("merge") or {"runs": ()})["runs"]}
    refitted = {f"{s['block']}.{s['kind']}" for s in (step.get("repair") or {"steps": ()})["steps"]}
    return _block(sublayer) in merged or sublayer in refitted


def _all(blocks: Sequence[int], first: Sequence[int]) -> list[int]:
    return [first[i] for i in blocks]


def _block(sublayer: str) -> int:
    return int(sublayer.partition(".")[0])


def _renamed(sublayer: str, first: Sequence[int]) -> str:
    index, _, kind = sublayer.partition(".")
    return f"{first[int(index)]}.{kind}"
