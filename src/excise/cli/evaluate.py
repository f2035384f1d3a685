"""`excise evaluate`: benchmarks, perplexity and speed of models, the original's beside the pruned one's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from excise.artefacts import json_text, read_json
from excise.cli.options import AsJson, Device, Dtype, TrustRemoteCode


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint folders, .gguf files, hub ids, or folders of `excise run`.", show_default=False
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="lm-eval's tasks, separated by commas; 'paper' stands for its six, 'paper-moe' for Fig. 5's."
        ),
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files (YAML) of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples a task, windows a text; all by default.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt; by default the task's own.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts through the tokenizer's chat template.")
    ] = False,
    batch_size: Annotated[str, typer.Option(help="Sequences at once, or auto.")] = "auto",
    perplexity: Annotated[Path | None, typer.Option(help="Measure the perplexity of this text file.")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens of its windows; by default 2048 or the model's positions.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens/s and memory.")] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of the speed measurement.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens it decodes.")] = 64,
    with_original: Annotated[
        bool, typer.Option("--with-original", help="Of a run's folder, judge the original too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="scores.json; by default in the run's folder, or here.", show_default=False)
    ] = None,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Add the scores to the model cards.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again what was measured before.")] = False,
) -> None:
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
        harness.task_names(tasks),
        shots,
        limit,
        chat_template,
        include_path,
        batch_size,
        perplexity,
        window,
        speed,
        prompt_tokens,
        new_tokens,
    )
    sources, destination = checkpoints(models, with_original), out or default_out(models)
    accelerator = harness.processes()
    place = device if accelerator is None else str(accelerator.device)

    def announce(text: str) -> AbstractContextManager[None]:
        console.print(text)  # no live status: lm-eval shows bars of its own
        return nullcontext()

    scores, hashes = judge(
        sources,
        plan,
        destination,
        lambda source: load_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code),
        again=force,
        announce=announce,
    )
    if accelerator is not None and not accelerator.is_main_process:
        return
    changed = [
        source for source in sources if card and update_card(source, scores, hashes[source], *chosen_from(source))
    ]
    if as_json:
        typer.echo(json_text(read_json(destination)))
        return
    output.print(scores_table(scores))
    output.print(f"scores: {destination}", *(f"model card: {source}/README.md" for source in changed))
