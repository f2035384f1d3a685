"""The race: several pruned models are healed for a short while, the worse half is dropped, and so on.

Which removal is best before healing need not be best after it. Successive halving (Jamieson and Talwalkar, 2016, arXiv
1502.07943) spends most of the training on those that lead. Every entrant follows the schedule of the whole training
and stops on the way, so the winner goes on exactly as if it had been healed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from excise.context import Context
from excise.data.samples import Samples
from excise.errors import InputError
from excise.healing.origin import origin_of
from excise.healing.settings import Settings
from excise.healing.sharding import whole
from excise.healing.teachers import Teacher
from excise.healing.trainer import Progress, Watching, planned_steps, train, training_place
from excise.measuring.measure import measure
from excise.models.loading import Loaded, load
from excise.plain import Facts
from excise.store import Store
from excise.team import team


@dataclass(frozen=True)
class Standing:
    """How one entrant did.

    Attributes:
        student: its checkpoint.
        losses: step → held-out loss after it, nats per token; infinite where the model overflowed.

    """

    student: str
    losses: Mapping[int, float]


@dataclass(frozen=True)
class Race:
    """The result of a race: entrants from best to worst, those that went further first.

    Attributes:
        standings: [entrants].
        steps_trained: optimiser steps of all entrants together.

    """

    standings: tuple[Standing, ...]
    steps_trained: int

    def describe(self) -> Facts:
        """The result as plain data; JSON has no infinity, so an infinite loss is None."""
        standings = [{"student": s.student, "losses": _finite(s.losses)} for s in self.standings]
        return {"standings": standings, "steps_trained": self.steps_trained}

    @property
    def winner(self) -> Standing:
        """The entrant that is left; `excise.healing.heal.heal` with the same store takes its training up."""
        return self.standings[0]


def _finite(losses: Mapping[int, float]) -> dict[str, float | None]:
    return {str(step): loss if math.isfinite(loss) else None for step, loss in losses.items()}


def race(
    students: Sequence[str],
    teacher: Teacher,
    samples: Samples,
    held_out: Samples,
    store: Store,
    settings: Settings,
    *,
    open_student: Callable[[str], Loaded] | None = None,
    report: Callable[[str, Progress], None] | None = None,
) -> Race:
    """Race pruned models against each other; a race that was interrupted goes on.

    Args:
        students: checkpoints of pruned models with one tokenizer, best guess first.
        teacher: shared by all; a recorded one spares its passes.
        samples: to train on.
        held_out: other samples, on which entrants are compared.
        store: for the trainings and the results; it needs a folder.
        settings: of the whole training that the winner is to have; its seed is everyone's.
        open_student: loads an entrant; by default `load` in float32.
        report: called with the checkpoint and its progress after every step.

    Returns:
        The standings, after the last rung but before the winner's last stretch.

    Raises:
        InputError: fewer than two entrants, the same one twice, too few steps to stop on the way, or a teacher that an
            entrant was not made from.

    """
    if len(students) < 2 or len(set(students)) < len(students):
        raise InputError(f"expected at least two different checkpoints to race, got {list(students)}")
    # float32 whatever is stored: updates of less than a few thousandths of a weight are lost in bfloat16.
    open_student = open_student or partial(load, dtype="float32")
    rungs = rungs_of(len(students), planned_steps(settings, len(samples)))
    facts = {"students": list(students), "settings": asdict(settings), "teacher": teacher.describe()}
    record = store.journal("race", {**facts, "samples": samples.hash, "held_out": held_out.hash})
    losses: list[dict[int, float]] = [{} for _ in students]
    alive = list(range(len(students)))
    order: list[int] = []
    for rung, step in enumerate(rungs):
        for number in alive:
            entry = rung * len(students) + number
            reached = team().once(lambda entry=entry: record.get(entry))  # type: ignore[misc]
            if reached is None:
                # Opened anew on every rung: one student in memory, however many race.
                student = open_student(students[number])
                origin = origin_of(student, teacher)
                tell = partial(report, students[number]) if report else None
                place = training_place(store, student.stack, teacher, samples, settings)
                watching = Watching(tell)
                train(student.stack, teacher, samples, place, settings, origin=origin, until=step, watching=watching)
                student = whole(student, place)
                reached = {"loss": np.array(measure(Context(student), held_out, [()]).loss())}
                record.write(entry, **reached)
            loss = reached["loss"].item()
            # An overflow must lose; NaN would leave the order to chance.
            losses[number][step] = loss if math.isfinite(loss) else math.inf
        ranked = sorted(alive, key=lambda number: losses[number][step])
        alive = ranked[: (len(ranked) + 1) // 2]
        # Who drops out later goes before those who dropped out earlier.
        order = ranked[len(alive) :] + order
    standings = (Standing(students[n], losses[n]) for n in (*alive, *order))
    return Race(tuple(standings), sum(max(reached) for reached in losses))


def rungs_of(entrants: int, steps: int) -> tuple[int, ...]:
    """Steps after which the worse half is dropped: the last at half of all steps, each before at half of the next.

    Raises:
        InputError: there are too few steps for that.

    Examples:
        >>> rungs_of(8, 80)
        (10, 20, 40)

    """
    halvings = math.ceil(math.log2(entrants))
    rungs = tuple(steps // 2 ** (halvings - rung) for rung in range(halvings))
    if rungs[0] < 1:
        raise InputError(
            f"a race of {entrants} needs at least {2**halvings} steps to halve the field {halvings} times, got {steps}"
        )
    return rungs
