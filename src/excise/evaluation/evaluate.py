"""Judge several models in one go: whatever scores.json does not hold yet is measured and added at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from excise.artefacts import check_types, inside, read_json
from excise.artefacts.provenance import provenance
from excise.data.fit import Fit
from excise.errors import InputError
from excise.evaluation import harness
from excise.evaluation.inputs import judged_identity
from excise.evaluation.perplexity import perplexity, text_settings
from excise.evaluation.scores import MANIFEST, Result, Scores, describe
from excise.evaluation.speed import speed, speed_settings
from excise.ising.spectrum import Spectrum
from excise.models.loading import Loaded
from excise.plain import Facts

Announce = Callable[[str], AbstractContextManager[Any]]
RUN = "run.json"


@dataclass(frozen=True)
class Plan:
    """What to measure of every model.

    Attributes:
        tasks: names of lm-eval's tasks, see `excise.evaluation.harness.task_names`.
        shots: examples in the prompt; None leaves each task its own number.
        limit: samples a task and windows a text; None takes all.
        chat_template: put prompts through the tokenizer's chat template.
        include_path: folder with task files of one's own.
        batch_size: a number, or auto.
        text: a text whose perplexity is measured.
        window: tokens of its windows.
        speed: measure speed and memory.
        prompt_tokens: of the speed measurement.
        new_tokens: of the speed measurement.

    """

    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None
    chat_template: bool = False
    include_path: Path | None = None
    batch_size: str = "auto"
    text: Path | None = None
    window: int | None = None
    speed: bool = False
    prompt_tokens: int = 512
    new_tokens: int = 64


def evaluate(
    sources: Sequence[str],
    plan: Plan,
    out: str | Path,
    load: Callable[[str], Loaded],
    *,
    again: bool = False,
    manager: Any = None,
    announce: Announce = lambda text: nullcontext(),
) -> tuple[Scores, dict[str, str]]:
    """Judge models; every result is written to `out` as soon as it is there, so an interrupted call resumes.

    Args:
        sources: folders, .gguf files or hub ids.
        plan: what to measure.
        out: scores.json; results already in it are kept.
        load: loads one of `sources`.
        again: measure also what `out` already holds.
        manager: an `lm_eval.tasks.TaskManager` that knows the tasks; None makes one.
        announce: context shown while something is measured.

    Returns:
        All scores in `out`, and the fingerprint of each source.

    Raises:
        InputError: nothing to measure, an unknown task or unreadable text, or a task that failed.
        MissingExtraError: tasks are named and lm-eval is not installed.

    """
    if not (plan.tasks or plan.text or plan.speed):
        raise InputError("nothing to evaluate: give --tasks, --perplexity FILE, --speed or --panel")
    scores = Scores.load(out) if Path(out).exists() else Scores()
    if plan.text:
        text_settings(plan.text, plan.window, plan.limit)
    if plan.tasks and manager is None:
        with announce("looking for the tasks"):
            manager = harness.task_manager(plan.tasks, plan.include_path)
    accelerator = harness.processes()
    first = accelerator is None or accelerator.is_main_process
    fingerprints: dict[str, str] = {}
    for source in dict.fromkeys(sources):
        loaded = load(source)
        fingerprint = fingerprints[source] = judged_identity(loaded)
        model = describe(source, loaded.stack.model, fingerprint)
        for name, result in _missing(plan, loaded, fingerprint, manager, Scores() if again else scores, first):
            with announce(f"{model.label}: {name}"):
                done = result()
            if done is not None and first:
                scores = replace(scores.adding(model, done), provenance=provenance())
                # After each result: a benchmark may take hours, and an interrupted call goes on behind the last one.
                scores.save(out)
    return scores, fingerprints


def _missing(
    plan: Plan, loaded: Loaded, fingerprint: str, manager: Any, known: Scores, first: bool
) -> Iterator[tuple[str, Callable[[], Result | None]]]:
    """What is not known yet: its name, and the measurement."""
    options = plan.shots, plan.limit, plan.chat_template
    settings = {task: harness.harness_settings(manager, task, *options) for task in plan.tasks}
    tasks = [task for task in plan.tasks if known.find(fingerprint, "benchmark", task, settings[task]) is None]
    lm = harness.harness_model(loaded, plan.batch_size) if tasks else None
    for task in tasks:
        yield task, partial(harness.benchmark, lm, task, settings[task], manager, fingerprint=fingerprint)
    model, tokenizer = loaded.stack.model, loaded.tokenizer
    if plan.text and first:
        name, window, limit, fit = plan.text.name, plan.window, plan.limit, Fit.of(loaded.stack)
        if known.find(fingerprint, "perplexity", name, text_settings(plan.text, window, limit)) is None:
            asked: Facts = {"fingerprint": fingerprint, "window": window, "limit": limit, "fit": fit}
            yield f"perplexity of {name}", partial(perplexity, model, tokenizer, plan.text, **asked)
    if plan.speed and first:
        lengths = {"prompt_tokens": plan.prompt_tokens, "new_tokens": plan.new_tokens}
        if known.find(fingerprint, "speed", "speed", speed_settings(**lengths, batch=1, device=model.device)) is None:
            yield "speed", partial(speed, model, fingerprint=fingerprint, **lengths)


def checkpoints(sources: Sequence[str], with_original: bool) -> list[str]:
    """Models to judge: a run's folder stands for its checkpoint and, if wished, for the model it was made from.

    Raises:
        InputError: a run's folder has lost its checkpoint.

    """
    found: list[str] = []
    for source in sources:
        folder = Path(source).expanduser()
        if not (folder / RUN).is_file():
            found.append(source)
            continue
        facts = _run(folder)
        if with_original:
            found.append(facts["model"])
        checkpoint = inside(folder, facts["checkpoint"], folder / RUN)
        if not checkpoint.is_dir():
            raise InputError(f"{folder} is a run without its checkpoint {checkpoint}; run it again, or name a model")
        found.append(str(checkpoint))
    return list(dict.fromkeys(found))


def default_out(sources: Sequence[str]) -> Path:
    """Where scores go if nothing is said: into the run's folder if one is judged, else into the current one."""
    runs = [Path(source).expanduser() for source in sources if (Path(source).expanduser() / RUN).is_file()]
    return (runs[0] if len(runs) == 1 else Path()) / MANIFEST


def chosen_from(checkpoint: str) -> tuple[Spectrum, str] | tuple[()]:
    """The spectrum that a run's checkpoint was chosen from, and its energy's name; empty where there is none."""
    folder = Path(checkpoint).expanduser().resolve().parent
    if not (folder / RUN).is_file():
        return ()
    facts = _run(folder)
    name = facts["spectra"].get(facts["energy"])
    path = folder if name is None else inside(folder, name, folder / RUN)
    return (Spectrum.load(path), facts["energy"]) if path.is_file() else ()


class _Run(TypedDict, total=False):
    """What of a run, whose file anyone may have edited, is looked at here."""

    model: str
    checkpoint: str
    energy: str
    spectra: dict[str, str]


def _run(folder: Path) -> Facts:
    """What run.json says of these, with the defaults of earlier versions."""
    path = folder / RUN
    facts = {"checkpoint": "model", "energy": "", "spectra": {}, **_object(path)}
    check_types(_Run, facts, path)
    if "model" not in facts:
        raise InputError(f"{path} does not name its model; expected what `excise run` writes")
    return facts


def _object(path: Path) -> Facts:
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise InputError(f"{path} is no JSON object; expected what `excise run` writes")
    return facts
