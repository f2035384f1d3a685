"""Healing inside a run: the race of the best candidates, if one is wished, and the healing of the pruned model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from excise.context import Context
from excise.data.samples import Samples
from excise.errors import InputError
from excise.healing.heal import finished, heal, job_of
from excise.healing.race import Race, race, rungs_of
from excise.healing.settings import Settings
from excise.healing.teachers import Teacher
from excise.healing.trackers import Tracking
from excise.healing.trainer import Progress, Watching, planned_steps, require_divisible
from excise.ising.problem import Removal
from excise.models.loading import Loaded
from excise.plain import Facts
from excise.repair.several import Repairs, write_removal
from excise.store import Store
from excise.team import team
from excise.text import ranges

FOLDER = "healed"

Watch = Callable[[], AbstractContextManager[Callable[[Progress, str], None]]]


def unwatched() -> AbstractContextManager[Callable[[Progress, str], None]]:
    """Show nothing."""
    return contextlib.nullcontext(lambda progress, name: None)


@dataclass(frozen=True, eq=False)
class Healing:
    """How a run heals what it pruned.

    Attributes:
        settings: of the training.
        teacher: the original.
        samples: to train on; none of those that the run holds out.
        open_student: loads a checkpoint for training, in float32.
        race: how many of the best candidates are healed for a while, to heal the winner to the end.
        watch: opens a display, and gives what to call with the progress after every step and a name.
        tracking: trackers that get the curve of what is healed to the end.

    """

    settings: Settings
    teacher: Teacher
    samples: Samples
    open_student: Callable[[str], Loaded]
    race: int = 1
    watch: Watch = unwatched
    tracking: Tracking = field(default_factory=Tracking)

    def require_feasible(self) -> None:
        """Refuse early what training would refuse late.

        Raises:
            InputError: too few samples for a batch, a batch that the processes cannot share, or too few steps for the
                race.

        """
        if len(self.samples) < self.settings.batch:
            raise InputError(
                f"healing needs at least one batch of {self.settings.batch} samples to train on, got "
                f"{len(self.samples)}; name more data, or a smaller batch"
            )
        require_divisible(self.settings)
        if self.race > 1:
            rungs_of(self.race, planned_steps(self.settings, len(self.samples)))


def race_removals(
    healing: Healing, context: Context, removals: Sequence[Removal], repairs: Repairs, held_out: Samples
) -> tuple[Race, dict[str, Removal]]:
    """Race removals, each repaired where that helps; an interrupted race goes on.

    Args:
        healing: how.
        context: the original, and the store, which needs a folder.
        removals: at least two, best guess first.
        repairs: of some of them.
        held_out: samples on which entrants are compared.

    Returns:
        The race, and the removal that each of its checkpoints stands for.

    """
    entrants = {str(_entrant(context, removed, repairs)): removed for removed in removals}
    with healing.watch() as report:
        result = race(
            list(entrants),
            healing.teacher,
            healing.samples,
            held_out,
            _trainings(context.store),
            healing.settings,
            open_student=healing.open_student,
            report=lambda name, progress: report(progress, ranges(entrants[name])),
        )
    return result, entrants


def _entrant(context: Context, removed: Removal, repairs: Repairs) -> Path:
    """The checkpoint of an entrant, written if it is not there."""
    # A repaired model is another model: its identity must be taken with the repair's weights in place.
    with repairs.applied(context.stack, removed):
        key = {"model_hash": context.identity, "removed": list(removed)}
    place = context.store.place("entrants", key)
    # The race needs a folder, too.
    assert place is not None
    # Written atomically: what exists is whole.
    if not (place / "model").exists():
        write_removal(context.loaded, removed, repairs, place / "model")
    return place / "model"


def _trainings(store: Store) -> Store:
    """The part of a run's store that goes when the training is done."""
    assert store.folder is not None
    return Store(store.folder / "healing")


def heal_pruned(
    healing: Healing, pruned: Path, held_out: Samples, out: Path, store: Store, *, won: Race | None
) -> Facts:
    """Heal the checkpoint of a run; where it won a race, its training goes on from there.

    Args:
        healing: how.
        pruned: the checkpoint's folder.
        held_out: samples on which the loss is measured before and after.
        out: folder to write.
        store: of the run; it needs a folder.
        won: the race that it won.

    Returns:
        What a run says of it: losses, steps, settings, samples, self-test.

    """
    student = healing.open_student(str(pruned))
    arguments = student, healing.teacher, healing.samples, held_out
    # A run that was killed after its healing finds it here.
    facts = finished(out, job_of(*arguments, healing.settings))
    if not facts:
        with healing.watch() as report:
            facts = heal(
                *arguments,
                out,
                healing.settings,
                store=_trainings(store),
                further={"race": won.describe()} if won else None,
                force=True,
                watching=Watching(lambda progress: report(progress, "healing"), healing.tracking),
            )
    # Only now: an interrupted run asks the race again, which would have to write its entrants anew.
    store.delete("entrants")
    told = ("losses", "domains", "steps", "settings", "teacher", "samples", "self_test", "seconds")
    # Of several processes the first writes it, and knows.
    facts = team().gather(facts)[0]
    return {"checkpoint": out.name, **{name: facts[name] for name in told}}
