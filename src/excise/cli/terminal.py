"""Progress bars and status lines on standard error, so that standard output holds results only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from excise.text import printable

if TYPE_CHECKING:
    from excise.context import Context
    from excise.data import Samples


class _PlainConsole(Console):
    """A console on which square brackets, colons and control characters are text: paths and names come from anywhere.

    Style comes from objects (tables, columns of a bar), never from what stands in a text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed, in tables too, comes through here."""
        return super().render_str(printable(text), **options)


console = _PlainConsole(stderr=True)
output = _PlainConsole(width=None if sys.stdout.isatty() else 140)


class NameColumn(ProgressColumn):
    """What a bar is of, as text."""

    def render(self, task: Task) -> Text:
        """The name, see `excise.text.printable`."""
        return Text(printable(task.description))


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:,.0f} tokens/s", style="cyan")


def be_quiet() -> None:
    """Show no progress, notes or warnings from now on; libraries that are imported later neither."""
    console.quiet = True
    warnings.simplefilter("ignore")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")


def tell_logs(level: str) -> None:
    """Show excise's logs from a level on, and those of what loads models where that is imported later."""
    # All others from warnings on: numba's debugging alone fills screens.
    rest = max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()])
    logging.basicConfig(level=rest, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("excise").setLevel(level.upper())
    for package in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{package}_VERBOSITY", level)


@contextlib.contextmanager
def tokens_progress(stage: str, tokens: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar over `tokens` tokens (None: not known), speed and time left; yields what to call with tokens done."""
    if tokens == 0:
        yield lambda tokens_done: None
        return
    columns = (
        NameColumn(),
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
    with console.status(Text(printable(text))):
        yield


def announce_cost(context: Context, samples: Samples, tokens: float) -> None:
    """Say what a stage will cost before it starts, from the speed of one batch."""
    import time

    import torch

    from excise.measuring.sweep import sweeps

    stack = context.stack
    if sweeps(stack):
        # One batch by itself would read all weights, and tell nothing of many.
        console.print(f"about {tokens:,.0f} forward tokens, block by block")
        return
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
