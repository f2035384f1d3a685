"""What `excise heal` and `excise run --heal` share: presets and what changes them, the display, what is printed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.errors import InputError
from excise.plain import Facts, Values

if TYPE_CHECKING:
    from excise.data import Samples
    from excise.healing.heal_stage import Healing
    from excise.healing.settings import Preset
    from excise.healing.trackers import Tracking
    from excise.models.loading import Loaded
    from excise.run import RunSettings

DATA = ("data", "samples", "tokens", "held_out", "teacher")


def preset_of(name: str, options: Values) -> Preset:
    """A preset, changed by the options that were given: those of `DATA`, and fields of its settings.

    Raises:
        InputError: there is no such preset, or an option is out of range.

    """
    from excise.healing.settings import PRESETS

    if name not in PRESETS:
        raise InputError(f"expected a preset in {', '.join(PRESETS)}, got '{name}'")
    given = {option: value for option, value in options.items() if value is not None}
    settings = replace(PRESETS[name].settings, **{k: v for k, v in given.items() if k not in DATA})
    return replace(PRESETS[name], settings=settings, **{k: v for k, v in given.items() if k in DATA})


def healing_of(
    plan: Preset, loaded: Loaded, held_out: Samples, asked: RunSettings, tracking: Tracking, *, race: int
) -> Healing:
    """How a run heals: on samples apart from those it holds out, taught by the model it has in memory if it may."""
    from functools import partial

    from excise.cli.terminal import load_model, status
    from excise.data import Fit, load_samples, own_answers
    from excise.healing.heal_stage import Healing
    from excise.healing.teachers import OnlineTeacher, load_teacher

    settings = plan.settings
    wanted = sys.maxsize if plan.samples is None else plan.samples + len(held_out)
    drawn = load_samples(
        plan.data,
        loaded.tokenizer,
        samples=wanted,
        tokens=plan.tokens,
        seed=settings.seed,
        loss_on=asked.loss_on,
        fit=Fit.of(loaded.stack),
        own=own_answers(loaded),
    )
    options: Facts = {"device": asked.device, "trust_remote_code": asked.trust_remote_code}
    teacher = loaded
    if plan.teacher != "auto":
        with status(f"loading {loaded.source} as the teacher"):
            teacher = load_teacher(loaded.source, plan.teacher, **options)
    return Healing(
        settings,
        OnlineTeacher(teacher.stack, settings.temperature, plan.teacher),
        drawn.apart_from(held_out)[: plan.samples],
        partial(load_model, dtype="float32", **options),
        race,
        training_bar,
        tracking,
    )


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[..., None]]:
    """Show step, loss, tokens/s and time left; yields what to call with the progress after each step, and whose."""
    from datetime import timedelta

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from excise.cli.terminal import NameColumn, console

    facts = TextColumn("loss {task.fields[loss]:.4f}  [cyan]{task.fields[speed]:,.0f} tokens/s[/]  {task.fields[left]}")
    with Progress(NameColumn(), BarColumn(), MofNCompleteColumn(), facts, console=console) as bar:
        tasks: Facts = {}

        def report(progress: Any, name: str = "healing") -> None:
            left = str(timedelta(seconds=round(progress.seconds_left)))
            fields = {"loss": progress.loss, "speed": progress.tokens_per_second, "left": f"{left} left"}
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=progress.steps, **fields)
            bar.update(tasks[name], completed=progress.step, **fields)

        yield report


def print_healed(out: Path, facts: Values) -> None:
    """Print steps, losses before and after, and what the self-test found."""
    from excise.cli.prune import print_self_test
    from excise.cli.terminal import output

    losses = ", ".join(f"{name} {value:.4f}" for name, value in facts["losses"].items())
    output.print(f"wrote {out}: {facts['steps']} steps; held-out loss in nats/token: {losses}")
    # What was healed before there were domains is found again without them.
    domains = facts.get("domains", {}).get("healed", {})
    if len(domains) > 1:
        before = facts["domains"]["pruned"]
        said = (f"{name or 'unnamed'} {before[name]:.2f} → {after:.2f}" for name, after in sorted(domains.items()))
        output.print(f"by domain: {', '.join(said)}")
    print_self_test(facts["self_test"])


def print_race(standings: Sequence[Values], name: Callable[[Values], str]) -> None:
    """Print how far each entrant went, and its held-out loss on the way."""
    from excise.cli.terminal import output

    for standing in standings:
        reached = (
            f"{'overflow' if loss is None else f'{loss:.4f}'} after {step} steps"
            for step, loss in standing["losses"].items()
        )
        output.print(f"race: {name(standing)}: {', '.join(reached)}")
