"""Trainings whose weights are spread over processes: FSDP2, where `accelerate launch --use_fsdp` asks for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from transformers import AutoModelForCausalLM, Trainer

from excise.errors import InputError
from excise.healing.checkpoints import last_whole
from excise.models.loading import Loaded
from excise.models.stack import find_stack
from excise.plain import Facts
from excise.team import launched

_SPREAD = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def sharding_options() -> Facts:
    """Arguments of the trainer's for sharding; none where it was not asked for.

    How parameters are offloaded or resharded is the launcher's to say.

    Raises:
        InputError: there is one process.

    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return {}
    if launched()[1] == 1:
        raise InputError("--use_fsdp shards weights over several processes, and there is one; leave it out")
    return {
        "fsdp": True,
        "fsdp_config": {
            # Accelerate's default, 1, flattens parameters: what learns could no longer be told by name.
            "version": 2,
            # Whole blocks, as the model's class names them.
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            # A checkpoint is then a model like any other: the result is read from it, by any number of processes.
            "state_dict_type": "FULL_STATE_DICT",
        },
    }


def require_sharded(trainer: Trainer, train: str) -> None:
    """Refuse what would not be sharded as it was asked, or could not be put together again.

    Args:
        trainer: once made: only then is it known how accelerate was configured.
        train: which weights learn, see `excise.healing.settings.Settings`.

    Raises:
        InputError: see above.

    """
    spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharding_options() and not spread:
        raise InputError("accelerate shards weights over GPUs, and these processes have none; leave out --use_fsdp")
    if train == "lora" and spread:
        raise InputError("LoRA's updates cannot be merged into sharded weights; train all, or without sharding")


def whole(student: Loaded, work: Path) -> Loaded:
    """The student as trained; read back from its last checkpoint where its weights are spread over processes."""
    if AcceleratorState().distributed_type not in _SPREAD:
        return student
    model = AutoModelForCausalLM.from_pretrained(str(last_whole(work)), dtype=torch.float32)
    return replace(student, stack=find_stack(model))
