"""What each process of the test with two of them runs: the same training of the same tiny model."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from excise.healing.settings import Settings
from excise.healing.teachers import OnlineTeacher
from excise.healing.trainer import train
from excise.models.stack import find_stack
from tests.random_samples import random_samples
from tests.tiny import tiny_model

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    teacher, student = find_stack(tiny_model("llama", 4)), find_stack(tiny_model("llama", 3, seed=1))
    settings = Settings(steps=5, batch=8, micro_batch=2, learning_rate=3e-3, save_every=2, warmup=0)
    curve = train(student, OnlineTeacher(teacher), random_samples([12, 9, 16, 10] * 5), out / "work", settings)
    if PartialState().is_main_process:
        norm = sum(float(p.double().square().sum()) for p in student.model.parameters()) ** 0.5
        (out / "result.json").write_text(json.dumps({"losses": [e["loss"] for e in curve], "norm": norm}))
