"""How the processes of a job speak with each other; that they agree is shown in tests/faults/test_teams.py."""

import pytest
import torch

from excise.team import _backend


@pytest.mark.parametrize(
    ("gpus", "processes", "backend"),
    [(0, "2", "gloo"), (2, "2", "cuda:nccl,cpu:gloo"), (8, "4", "cuda:nccl,cpu:gloo"), (1, "2", "gloo")],
)
def test_two_processes_on_one_gpu_do_without_nccl(gpus, processes, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert _backend() == backend
