"""Contexts of models in memory, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from excise.choosing.brief import Brief
from excise.choosing.criteria import Criterion
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.models.loading import Loaded
from excise.models.stack import Stack
from excise.progress import Progress
from excise.store import Store


def context_of(
    stack: Stack, folder: Path | None = None, told: Callable[[int], None] | None = None, **fields: Any
) -> Context:
    """The context of a stack: what is kept goes into `folder`, or lasts as long as the context.

    `told` is called with the tokens done.
    """
    if told is not None:
        fields["progress"] = Progress(lambda stage, tokens: nullcontext(told))
    return Context(Loaded.of(stack), Store(folder), **fields)


def chosen(
    criterion: Criterion,
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    **context: Any,
) -> Proposal:
    """What a criterion answers; `context` as for `context_of`."""
    return criterion(context_of(stack, **context), samples, Brief.on(stack, budget, protected=protected, seed=seed))[0]


class Shown:
    """A display that remembers what it was told.

    Attributes:
        stages: names of the bars opened.
        announced: tokens of each, 0 where they were not known.
        done: what each `advance` was called with.

    """

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.announced: list[int] = []
        self.done: list[int] = []

    def __call__(self, stage: str, tokens: int | None) -> AbstractContextManager[Callable[[int], None]]:
        self.stages.append(stage)
        self.announced.append(tokens or 0)
        return nullcontext(self.done.append)
