"""Training whose weights are spread over processes: the result of one, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from excise.artefacts import read_json
from excise.errors import InputError
from excise.healing.sharding import require_sharded, sharding_options
from excise.surgery.on_disk import prune_folder
from tests.healing.heal_sharded import healed
from tests.tiny import tiny_folder

SHARDED, WHOLE = (SimpleNamespace(is_fsdp_enabled=spread, is_deepspeed_enabled=False) for spread in (True, False))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # with a head of its own, and a tied one
def test_two_processes_with_half_the_weights_each_heal_as_one_does(model_type, tmp_path):
    tiny_folder(tmp_path / "original", model_type, 4)
    prune_folder(tmp_path / "original", (2,), tmp_path / "pruned")
    healed(tmp_path, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = str(Path(__file__).with_name("heal_sharded.py"))
    subprocess.run(
        [*command, script, tmp_path, tmp_path / "two", "--sharded"], env=environment, check=True, timeout=500
    )
    one, two = (read_json(tmp_path / name / "heal.json") for name in ("one", "two"))
    assert [step["loss"] for step in two["curve"]] == pytest.approx([step["loss"] for step in one["curve"]], rel=1e-5)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["self_test"]["passed"]
    before, one_after, two_after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "one", "two")
    )
    assert one_after.keys() == two_after.keys()
    # Beside how far training went: what should have no gradient (biases of keys) moves by rounding alone.
    assert distance(one_after, two_after) < 0.01 * distance(one_after, before)


def distance(one, other):
    return sum(float((weight - other[name]).double().square().sum()) for name, weight in one.items()) ** 0.5


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    assert sharding_options() == {}
    require_sharded(WHOLE, "lora")
    with pytest.raises(InputError, match="LoRA's updates cannot be merged into sharded weights"):
        require_sharded(SHARDED, "lora")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="over several processes, and there is one"):
        sharding_options()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding_options()["fsdp_config"]["version"] == 2
    with pytest.raises(InputError, match="over GPUs, and these processes have none"):
        require_sharded(WHOLE, "all")
