"""The processes that share a job, as `torchrun` and `accelerate launch` start them.

Every process runs the same program with the same seeds. Only passes over samples and candidates are divided; what is
decided under a time limit is decided by the first and told, and artefacts are written by the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Value = TypeVar("Value")

# One process may solve or write for long while the others wait.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Team:
    """One process among those that share a job.

    Attributes:
        rank: its number, 0 for the first.
        size: how many there are.

    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The part of this process: every so-maniest, so that what is sorted by size is divided evenly."""
        return items[self.rank :: self.size]

    def gather(self, value: Value) -> list[Value]:
        """What every process gives, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def once(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, told to all; an error of its is raised by all."""
        if self.size == 1:
            return make()
        from torch import distributed

        told: list[Any] = [None]
        if self.first:
            try:
                told = [(make(), None)]
            # Whatever it is, the others must not wait for what never comes.
            except Exception as failure:
                told = [(None, failure)]
        distributed.broadcast_object_list(told, src=0)
        value, error = told[0]
        if error is not None:
            raise error
        return value

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.gather(None)


_JOINED: list[Team] = []


def launched() -> tuple[int, int]:
    """Rank and number of processes, as the launcher says; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched_here() -> int:
    """Number of processes on this machine, as the launcher says; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_here() -> int:
    """Number of this process among those on its machine, as the launcher says; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def team() -> Team:
    """The processes that this one has joined; by itself until then."""
    return _JOINED[0] if _JOINED else Team()


def join() -> Team:
    """Meet the other processes of this job, if there are any."""
    rank, size = launched()
    if size > 1:
        import torch
        from accelerate import PartialState
        from torch import distributed

        if not distributed.is_initialized():
            PartialState(cpu=not torch.cuda.is_available(), backend=_backend(), timeout=PATIENCE)
    _JOINED[:] = [Team(rank, size)]
    return team()


def _backend() -> str:
    """What processes speak through."""
    from torch import cuda

    # NCCL knows no two processes on one GPU; gloo carries their sums through host memory.
    if cuda.device_count() < launched_here():
        return "gloo"
    # Both, as what is told and gathered lies in host memory.
    return "cuda:nccl,cpu:gloo"


def part() -> None:
    """Leave the others, at the end of a job."""
    from torch import distributed

    _JOINED.clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()
