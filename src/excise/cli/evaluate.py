"""`excise evaluate`: benchmarks, perplexity, speed, capabilities; the original's beside the pruned model's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from excise.artefacts import json_text, read_json
from excise.errors import InputError
from excise.plain import Facts
from excise.settings import Naming, Placement, Printing, Replacing, changed, option

if TYPE_CHECKING:
    from excise.evaluation.panel.panel import Panel
    from excise.models.loading import Loaded


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Replacing, Printing, Placement):
    """Settings of `excise evaluate`."""

    divides = "itself"

    models: tuple[str, ...] = option(
        ..., "Checkpoint folders, .gguf files, hub ids, or folders of `excise run`.", argument=True, reads="path"
    )
    tasks: str = option(
        "", "lm-eval's tasks, separated by commas; 'paper' stands for its six, 'paper-moe' for Fig. 5's."
    )
    include_path: Path | None = option(None, "Folder with task files (YAML) of your own.", reads="path")
    limit: int | None = option(
        None, "Samples per task, windows per text, questions per capability; all by default.", least=1
    )
    shots: int | None = option(None, "Examples in the prompt; by default the task's own.", least=0)
    chat_template: bool = option(False, "Put prompts through the tokenizer's chat template.")
    batch_size: str = option("auto", "Sequences at once, or auto.", group="Machine")
    perplexity: Path | None = option(None, "Measure the perplexity of this text file.", reads="path")
    window: int | None = option(None, "Tokens of its windows; by default 2048 or the model's positions.", least=2)
    speed: bool = option(False, "Measure tokens/s and memory.")
    prompt_tokens: int = option(512, "Prompt of the speed measurement.", least=1)
    new_tokens: int = option(64, "Tokens it decodes.", least=2)
    panel: bool = option(False, "Ask the panel's questions of the models and of their original (docs/panel.md).")
    against: str | None = option(None, "The original to ask; by default the one that the models name.", reads="path")
    with_original: bool = option(False, "Of a run's folder, judge the original too.")
    out: Path | None = option(
        None, "scores.json; by default in the run's folder, or here.", group="Output", writes="update"
    )
    card: bool = option(True, "Add the scores to the model cards.", group="Output")
    dtype: str = changed(Naming, "dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size expects a whole number of at least 1, or auto, got '{self.batch_size}'")
        if self.against is not None and not self.panel:
            raise InputError("--against names the panel's original; it needs --panel")

    @property
    def scores(self) -> bool:
        """Whether anything goes into scores.json; asked for nothing, the plan says what can be asked."""
        return bool(self.tasks or self.perplexity or self.speed) or not self.panel


def evaluate(settings: EvaluateSettings) -> None:
    """Judge models by lm-eval's benchmarks, perplexity, speed and the panel of capabilities.

    What scores.json or panel.json hold already is not repeated. For several GPUs with a copy of the model each:
    accelerate launch -m excise evaluate …
    """
    from excise.cli.terminal import output
    from excise.evaluation.evaluate import default_out
    from excise.evaluation.harness import processes

    destination, accelerator = settings.out or default_out(settings.models), processes()
    shown: Facts = {}
    hashes = _judge(settings, destination, accelerator) if settings.scores else {}
    if accelerator is not None and not accelerator.is_main_process:
        return
    if settings.scores:
        shown = read_json(destination)
    if settings.panel:
        from excise.evaluation.panel.panel import FILE
        from excise.report.panel import panel_table

        place = destination.with_name(FILE)
        panel = _panel(settings, place)
        shown = {**shown, "panel": panel.to_json()}
        if not settings.as_json:
            output.print(panel_table(panel))
            output.print(f"panel: {place}")
    cards = _updated_cards(settings, destination, hashes) if settings.card else []
    if settings.as_json:
        typer.echo(json_text(shown))
    elif cards:
        output.print(*(f"model card: {card}" for card in cards))


def _judge(settings: EvaluateSettings, destination: Path, accelerator: Any) -> dict[str, str]:
    """Benchmarks, perplexity and speed, divided among processes; returns the fingerprint of each model."""
    from excise.cli.terminal import console, output
    from excise.evaluation import harness
    from excise.evaluation.evaluate import Plan, checkpoints
    from excise.evaluation.evaluate import evaluate as judge
    from excise.report.scores import scores_table

    plan = Plan(
        harness.task_names(settings.tasks),
        settings.shots,
        settings.limit,
        settings.chat_template,
        settings.include_path,
        settings.batch_size,
        settings.perplexity,
        settings.window,
        settings.speed,
        settings.prompt_tokens,
        settings.new_tokens,
    )
    sources = checkpoints(settings.models, settings.with_original)
    place = settings.device if accelerator is None else str(accelerator.device)

    def announce(text: str) -> AbstractContextManager[None]:
        console.print(text)  # no live status: lm-eval shows bars of its own
        return nullcontext()

    scores, hashes = judge(
        sources,
        plan,
        destination,
        lambda source: _load(settings, source, place),
        again=settings.force,
        announce=announce,
    )
    if not settings.as_json and (accelerator is None or accelerator.is_main_process):
        output.print(scores_table(scores))
        output.print(f"scores: {destination}")
    return hashes


def _updated_cards(settings: EvaluateSettings, destination: Path, hashes: Mapping[str, str]) -> list[Path]:
    """Bring all that is known of the models into their cards; returns those that have one."""
    from excise.evaluation.evaluate import checkpoints, chosen_from
    from excise.evaluation.panel.panel import known_panel
    from excise.evaluation.scores import Scores, name_of
    from excise.surgery.card_scores import update_card

    scores, changed = Scores.load(destination) if destination.exists() else Scores(), []
    for source in checkpoints(settings.models, settings.with_original):
        # Asked for the panel alone, nobody worked out a fingerprint; scores of earlier calls are found by name.
        judged = (model.hash for model in scores.models.values() if model.name == name_of(source))
        fingerprint = hashes.get(source) or next(judged, "")
        spectrum, energy = chosen_from(source) or (None, "")
        # The card's section is made anew: what is left out here, it loses.
        panel = known_panel(source, [destination.parent, Path(source).expanduser().resolve().parent])
        if update_card(source, scores, fingerprint, spectrum, energy, panel):
            changed.append(Path(source) / "README.md")
    return changed


def _panel(settings: EvaluateSettings, place: Path) -> Panel:
    from excise.cli.terminal import tokens_progress
    from excise.evaluation.evaluate import checkpoints
    from excise.evaluation.panel.ask_all import ask_all, original_of
    from excise.progress import Progress

    sources = checkpoints(settings.models, with_original=False)
    return ask_all(
        settings.against or original_of(settings.models),
        sources,
        place,
        lambda source: _load(settings, source, settings.device),
        limit=settings.limit,
        again=settings.force,
        progress=Progress(tokens_progress),
    )


def _load(settings: EvaluateSettings, source: str, device: str) -> Loaded:
    from excise.cli.terminal import load_model

    return load_model(source, dtype=settings.dtype, device=device, trust_remote_code=settings.trust_remote_code)
