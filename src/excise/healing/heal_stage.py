"""Healing inside a run: the race of the best candidates, if one is wished, and the healing of the pruned model."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.data.samples import Samples
from excise.errors import InputError
from excise.healing.heal import heal
from excise.healing.race import Race, race, rungs_of
from excise.healing.settings import Settings
from excise.healing.teachers import Teacher
from excise.healing.trainer import Progress, planned_steps
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.repair.repair_stage import Removal, Repairs, write_removal
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

    """

    settings: Settings
    teacher: Teacher
    samples: Samples
    open_student: Callable[[str], Loaded]
    race: int = 1
    watch: Watch = unwatched

    def require_feasible(self) -> None:
        """Refuse early what training would refuse late.

        Raises:
            InputError: too few samples for a batch, or too few steps for the race.

        """
        if len(self.samples) < self.settings.batch:
            raise InputError(
                f"healing needs at least one batch of {self.settings.batch} samples to train on, got "
                f"{len(self.samples)}; name more data, or a smaller batch"
            )
        if self.race > 1:
            rungs_of(self.race, planned_steps(self.settings, len(self.samples)))


def race_removals(
    healing: Healing, loaded: Loaded, removals: Sequence[Removal], repairs: Repairs, held_out: Samples, work: Path
) -> tuple[Race, dict[str, Removal]]:
    """Race removals, each repaired where that helps; an interrupted race goes on.

    Args:
        healing: how.
        loaded: the original.
        removals: at least two, best guess first.
        repairs: of some of them.
        held_out: samples on which entrants are compared.
        work: folder of the run's unfinished work.

    Returns:
        The race, and the removal that each of its checkpoints stands for.

    """
    entrants = {str(_entrant(loaded, removed, repairs, work)): removed for removed in removals}
    with healing.watch() as report:
        result = race(
            list(entrants),
            healing.teacher,
            healing.samples,
            held_out,
            work / "race",
            healing.settings,
            open_student=healing.open_student,
            report=lambda name, progress: report(progress, ranges(entrants[name])),
        )
    return result, entrants


def _entrant(loaded: Loaded, removed: Removal, repairs: Repairs, work: Path) -> Path:
    """The checkpoint of an entrant, written if it is not there."""
    with repairs.applied(loaded.stack, removed):
        identity = f"{model_identity(loaded.stack.model)} {removed}"
    folder = work / "entrants" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not folder.exists():
        write_removal(loaded, removed, repairs, folder)
    return folder


def heal_pruned(
    healing: Healing, pruned: Path, held_out: Samples, out: Path, work: Path, *, won: Race | None, force: bool
) -> dict[str, Any]:
    """Heal the checkpoint of a run; where it won a race, its training goes on from there.

    Args:
        healing: how.
        pruned: the checkpoint's folder.
        held_out: samples on which the loss is measured before and after.
        out: folder to write.
        work: folder of the run's unfinished work.
        won: the race that it won.
        force: replace a checkpoint in `out`.

    Returns:
        What a run says of it: losses, steps, settings, samples, self-test.

    """
    with healing.watch() as report:
        facts = heal(
            healing.open_student(str(pruned)),
            healing.teacher,
            healing.samples,
            held_out,
            out,
            healing.settings,
            work=won.winner.work if won else work / "heal",
            further={"race": won.describe()} if won else None,
            force=force,
            report=lambda progress: report(progress, "healing"),
        )
    for name in ("entrants", "race"):
        shutil.rmtree(work / name, ignore_errors=True)
    told = ("losses", "steps", "settings", "teacher", "samples", "self_test", "seconds")
    return {"checkpoint": out.name, **{name: facts[name] for name in told}}
