"""Where a student came from, and whether a teacher is what it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from excise.errors import InputError
from excise.healing.teachers import OfflineTeacher, OnlineTeacher, Teacher, anatomy
from excise.models.loading import Loaded
from excise.plain import Facts, Values
from excise.surgery.recipe import HISTORY, read_recipe


@dataclass(frozen=True)
class Origin:
    """Where a pruned model came from.

    Attributes:
        original_blocks: [student's blocks], their indices in the teacher.
        teacher_blocks: number of the teacher's blocks.

    """

    original_blocks: tuple[int, ...]
    teacher_blocks: int

    @staticmethod
    def of(recipe: Values, teacher_blocks: Sequence[int] | None = None) -> Origin | None:
        """Read it from a recipe (excise.json); None where the recipe does not say, or nothing was removed.

        Args:
            recipe: the student's.
            teacher_blocks: the first original's indices of the blocks that the teacher has; None where it has all.

        Raises:
            InputError: the teacher lacks a block that the student has.

        """
        kept, removed = recipe.get("original_blocks"), recipe.get("removed")
        if kept is None or removed is None:
            return None
        teacher = range(len(kept) + len(removed)) if teacher_blocks is None else tuple(teacher_blocks)
        if not set(kept) <= set(teacher):
            lost = min(set(kept) - set(teacher))
            raise InputError(
                f"the teacher lacks block {lost} of the original, which the student has, so it is not what the student "
                f"was made from; name {_named(recipe)}"
            )
        return Origin(tuple(teacher.index(i) for i in kept), len(teacher))


def recipe_of(student: Loaded) -> Facts:
    """The recipe beside a checkpoint's weights, in the hub's cache too; empty where it has none."""
    return read_recipe(student.folder or student.source)


def origin_of(student: Loaded, teacher: Teacher) -> Origin | None:
    """Say which of the teacher's blocks the student has; None where nothing tells what was removed.

    The teacher may be the first original, or any checkpoint on the way from it to the student.

    Args:
        student: the pruned model.
        teacher: what it is to learn from.

    Raises:
        InputError: the student's recipe does not explain the teacher's model type, width or depth.

    """
    recipe = recipe_of(student)
    own = Origin.of(recipe)
    told = anatomy(teacher.stack) if isinstance(teacher, OnlineTeacher) else None
    if isinstance(teacher, OfflineTeacher):
        told = teacher.facts.get("anatomy")
    if own is None or told is None:
        return own
    mine = anatomy(student.stack)
    for key, name in (("model_type", "model type"), ("width", "width")):
        if None not in (told[key], mine[key]) and told[key] != mine[key]:
            raise InputError(
                f"the teacher's {name} is {told[key]}, the student's {mine[key]}; expected what the student was made "
                f"from, {_named(recipe)}"
            )
    if told["original_blocks"] is not None:
        return Origin.of(recipe, told["original_blocks"])
    if told["blocks"] == own.teacher_blocks:
        return own
    if not recipe["removed"] and not recipe.get(HISTORY):
        return None  # a model pruned by another tool, which excise has only healed
    raise InputError(
        f"the student's excise.json tells of an original of {own.teacher_blocks} blocks, and the teacher has "
        f"{told['blocks']}; name {_named(recipe)}"
    )


def _named(recipe: Values) -> str:
    return str(recipe.get("original") or "the student's own original")
