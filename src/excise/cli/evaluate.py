"""`excise evaluate`: benchmarks, perplexity and speed of models, the original's beside the pruned one's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import typer

from excise.artefacts import json_text, read_json
from excise.errors import InputError
from excise.settings import Loading, Placement, Printing, Replacing, changed, option


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Replacing, Printing, Placement):
    """Settings of `excise evaluate`."""

    models: tuple[str, ...] = option(
        ..., "Checkpoint folders, .gguf files, hub ids, or folders of `excise run`.", argument=True, reads="path"
    )
    tasks: str = option(
        "", "lm-eval's tasks, separated by commas; 'paper' stands for its six, 'paper-moe' for Fig. 5's."
    )
    include_path: Path | None = option(None, "Folder with task files (YAML) of your own.", reads="path")
    limit: int | None = option(None, "Samples per task, windows per text; all by default.", least=1)
    shots: int | None = option(None, "Examples in the prompt; by default the task's own.", least=0)
    chat_template: bool = option(False, "Put prompts through the tokenizer's chat template.")
    batch_size: str = option("auto", "Sequences at once, or auto.", group="Machine")
    perplexity: Path | None = option(None, "Measure the perplexity of this text file.", reads="path")
    window: int | None = option(None, "Tokens of its windows; by default 2048 or the model's positions.", least=2)
    speed: bool = option(False, "Measure tokens/s and memory.")
    prompt_tokens: int = option(512, "Prompt of the speed measurement.", least=1)
    new_tokens: int = option(64, "Tokens it decodes.", least=2)
    with_original: bool = option(False, "Of a run's folder, judge the original too.")
    out: Path | None = option(
        None, "scores.json; by default in the run's folder, or here.", group="Output", writes="update"
    )
    card: bool = option(True, "Add the scores to the model cards.", group="Output")
    dtype: str = changed(Loading, "dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size expects a whole number of at least 1, or auto, got '{self.batch_size}'")


def evaluate(settings: EvaluateSettings) -> None:
    """Judge models by lm-eval's benchmarks, perplexity and speed; what scores.json holds already is not repeated.

    For several GPUs with a copy of the model each: accelerate launch -m excise evaluate …
    """
    from excise.cli.terminal import console, load_model, output
    from excise.evaluation import harness
    from excise.evaluation.evaluate import Plan, checkpoints, chosen_from, default_out
    from excise.evaluation.evaluate import evaluate as judge
    from excise.report.scores import scores_table
    from excise.surgery.card_scores import update_card

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
    destination = settings.out or default_out(settings.models)
    accelerator = harness.processes()
    place = settings.device if accelerator is None else str(accelerator.device)

    def announce(text: str) -> AbstractContextManager[None]:
        console.print(text)  # no live status: lm-eval shows bars of its own
        return nullcontext()

    scores, hashes = judge(
        sources,
        plan,
        destination,
        lambda source: load_model(
            source, dtype=settings.dtype, device=place, trust_remote_code=settings.trust_remote_code
        ),
        again=settings.force,
        announce=announce,
    )
    if accelerator is not None and not accelerator.is_main_process:
        return
    updated = [
        source
        for source in sources
        if settings.card and update_card(source, scores, hashes[source], *chosen_from(source))
    ]
    if settings.as_json:
        typer.echo(json_text(read_json(destination)))
        return
    output.print(scores_table(scores))
    output.print(f"scores: {destination}", *(f"model card: {source}/README.md" for source in updated))
