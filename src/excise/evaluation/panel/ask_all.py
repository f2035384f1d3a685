"""The panel of checkpoints on disk: one in memory at a time, resumed where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from excise.artefacts import RECIPE, read_json
from excise.context import Context
from excise.errors import InputError
from excise.evaluation.evaluate import checkpoints
from excise.evaluation.inputs import judged_identity
from excise.evaluation.panel.panel import Asked, Panel, asked, panel_of, questions_facts, reference
from excise.models.loading import Loaded
from excise.progress import Progress
from excise.store import Store

Load = Callable[[str], Loaded]


def ask_all(
    original: str,
    results: Sequence[str],
    out: str | Path,
    load: Load,
    *,
    limit: int | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Panel:
    """Ask an original and its results, and write the panel; one that is there already is not made again.

    Args:
        original: a folder, a .gguf file or a hub id.
        results: likewise; the original among them is left out.
        out: panel.json. What is unfinished lies beside it, and is found again.
        load: loads one of them.
        limit: questions of each capability and domain; None for all.
        again: make it again.
        progress: shows progress.

    Raises:
        InputError: a model has no tokenizer, or reads the questions otherwise than the original.

    """
    out, progress = Path(out), progress or Progress()
    others = [source for source in results if source != original]
    if out.exists() and not again and (found := _same(Panel.load(out), [original, *others], limit, load)):
        return found
    store = Store(out.with_name(f".{out.name}.work"))

    def context_of(source: str) -> Context:
        return Context(load(source), store, progress)

    first = reference(context_of(original), original, limit)

    # Each model is let go before the next is loaded.
    def answered(source: str) -> Asked:
        return asked(context_of(source), source, first)

    panel = panel_of(first, [answered(source) for source in others])
    panel.save(out)
    store.delete()
    return panel


def _same(panel: Panel, sources: Sequence[str], limit: int | None, load: Load) -> Panel | None:
    """The panel itself, if it has the same questions and the same models; None otherwise."""
    facts = questions_facts(limit)
    if len(panel.models) != len(sources) or {name: panel.questions.get(name) for name in facts} != facts:
        return None
    same = all(judged_identity(load(source)) == model.hash for source, model in zip(sources, panel.models, strict=True))
    return panel if same else None


def original_of(sources: Sequence[str]) -> str:
    """The model that these were made from: a run names it, and the recipe beside a checkpoint's weights.

    Args:
        sources: as the user names them.

    Raises:
        InputError: nothing tells, or they come from several.

    """
    found = dict.fromkeys(name for source in sources for name in _named(source))
    if len(found) != 1:
        told = "nothing tells which" if not found else f"they come from {', '.join(found)}"
        raise InputError(f"the panel asks a model beside its original, and {told}; name it with --against ORIGINAL")
    return next(iter(found))


def _named(source: str) -> list[str]:
    run = checkpoints([source], with_original=True)
    if len(run) > 1:
        return run[:1]
    recipe = Path(source).expanduser() / RECIPE
    original = read_json(recipe).get("original") if recipe.is_file() else None
    return [original] if isinstance(original, str) else []
