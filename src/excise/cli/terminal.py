"""Progress bars and status lines on standard error, so that standard output holds results only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from excise.context import Context
    from excise.data import Samples

# Without markup: names of files and models are shown as they are, [/brackets] and all.
console = Console(stderr=True, markup=False)
output = Console(width=None if sys.stdout.isatty() else 140, markup=False)


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:,.0f} tokens/s", style="cyan")


@contextlib.contextmanager
def tokens_progress(stage: str, tokens: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar over `tokens` tokens (None: not known), speed and time left; yields what to call with tokens done."""
    if tokens == 0:
        yield lambda tokens_done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage, total=tokens)
        yield lambda tokens_done: bar.update(task, advance=tokens_done)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show a line while something without measurable progress goes on."""
    with console.status(text):
        yield


def announce_cost(context: Context, samples: Samples, tokens: float) -> None:
    """Say what a stage will cost before it starts, from the speed of one batch."""
    import time

    import torch

    stack = context.stack
    batch = context.batches(samples.first_tokens(context.tokens_per_batch))[0]
    with torch.no_grad():
        stack.hidden(batch.to(stack.device).input_ids)  # the first pass allocates
        started = time.perf_counter()
        stack.logits(stack.hidden(batch.to(stack.device).input_ids)[:, :1])
    speed = batch.tokens / (time.perf_counter() - started)
    console.print(f"about {tokens:,.0f} forward tokens, {tokens / speed / 60:.1f} minutes at {speed:,.0f} tokens/s")


def load_model(source: str, **options: Any) -> Any:
    """Load a model under a status line (see `excise.models.loading.load`)."""
    with status(f"loading {source}"):
        from excise.models.loading import load

        return load(source, **options)
