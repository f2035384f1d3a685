"""What each process of the test of sharded training runs: a healing that is stopped, and goes on to a checkpoint."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor

from excise.healing.heal import heal
from excise.healing.origin import origin_of
from excise.healing.settings import Settings
from excise.healing.teachers import OnlineTeacher
from excise.healing.trainer import train, training_place
from excise.models.loading import load
from excise.store import Store
from tests.random_samples import random_samples

SETTINGS = Settings(steps=4, batch=4, micro_batch=1, learning_rate=3e-3, save_every=2, warmup=0, hidden=0.1)
SAMPLES, HELD_OUT = random_samples([12, 9, 16, 10] * 4), random_samples([8, 7], seed=1)


def healed(folder: Path, out: Path) -> None:
    """Heal `pruned` of a folder towards its `original`."""
    teacher = OnlineTeacher(load(str(folder / "original"), dtype="float32").stack)
    student, again = (load(str(folder / "pruned"), dtype="float32") for _ in range(2))
    store = Store(out.with_name(f".{out.name}.work"))
    place = training_place(store, student.stack, teacher, SAMPLES, SETTINGS)
    train(student.stack, teacher, SAMPLES, place, SETTINGS, origin=origin_of(student, teacher), until=2)
    sharded = [p for p in student.stack.model.parameters() if isinstance(p, DTensor)]
    assert len(sharded) == (len(list(student.stack.model.parameters())) if "--sharded" in sys.argv else 0)
    heal(again, teacher, SAMPLES, HELD_OUT, out, SETTINGS, store=store)


def shard_without_gpus() -> None:
    """Have accelerate shard, which it does over GPUs only; PyTorch would over any processes."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    begin = PartialState.__init__

    def said_to_have_gpus(self: PartialState, *arguments: Any, **options: Any) -> None:
        begun = PartialState._shared_state != {}
        begin(self, *arguments, **options)
        if not begun:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = said_to_have_gpus  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--sharded" in sys.argv:
        shard_without_gpus()
    healed(Path(sys.argv[1]), Path(sys.argv[2]))
