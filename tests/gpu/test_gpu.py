"""What other tests show on a CPU, on a GPU, and that both agree: `make test-gpu`, skipped where there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from excise.artefacts import read_json
from excise.evaluation.speed import speed
from excise.measuring.measure import measure
from excise.measuring.score import score
from excise.measuring.sweep import sweeps
from excise.models.loading import load
from excise.models.stack import removable_indices
from excise.repair.measured import measure_repaired
from excise.repair.several import repair_removals, write_removal
from excise.surgery.check import check_loaded
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import removable_pair, tiny_folder

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `make test-gpu` where there is one"),
]
FITTING, JUDGING = random_samples([11, 7, 13, 5, 9]), random_samples([8, 12, 6], seed=1)
BLOCKS = 6
DATA = ("--samples", 24, "--tokens", 24)
# Products are in float32 on both sides, but added up in another order.
CLOSE = {"rtol": 2e-3, "atol": 2e-5}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gemma3", "gemma4_text", "mixtral", "nemotron_h"])
def folder(request, tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("gpu") / "model", request.param, BLOCKS))


@pytest.fixture(scope="module")
def ways(folder):
    """On the CPU; on the GPU; there a block at a time; and two blocks there, one in memory, the others on the disk."""
    on_cpu = load(folder, device="cpu")
    model, path = on_cpu.stack.model, on_cpu.stack.architecture.stack
    sizes = [sum(p.numel() for p in block.parameters()) * 4 for block in model.get_submodule(path)]
    rest = sum(p.numel() for p in model.parameters()) * 4 - sum(sizes)
    some = {"0": rest + sum(sizes[:2]), "cpu": sizes[2]}
    return {
        "cpu": on_cpu,
        "gpu": load(folder, device=GPU, dtype="float32"),
        "streamed": load(folder, device=GPU, dtype="float32", placement="streamed"),
        "filled": load(folder, dtype="float32", placement=some),
    }


@pytest.fixture(scope="module")
def removed(ways):
    stack = ways["cpu"].stack
    return removable_indices(stack, removable_pair(stack.config.model_type))


def each(ways, make):
    return {name: make(context_of(loaded.stack, batch_tokens=24)) for name, loaded in ways.items()}


def agree(found):
    expected = found.pop("cpu")
    for name, other in found.items():
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(other, expected, rtol=CLOSE["rtol"], atol=CLOSE["atol"] * scale, err_msg=name)


def test_weights_are_where_they_should_be(ways):
    assert ways["gpu"].stack.device.type == "cuda"
    assert [sweeps(ways[name].stack) for name in ("cpu", "gpu")] == [False, False]
    kept = ways["cpu"].stack.shares_kv
    assert [sweeps(ways[name].stack) for name in ("streamed", "filled")] == [not kept, not kept]
    where = [{p.device.type for p in block.module.parameters()} for block in ways["filled"].stack.blocks]
    assert where == [{"cuda"}, {"cuda"}, *[{"meta"}] * 4]


def test_gradients_losses_and_damage_are_those_of_the_cpu(ways, removed):
    removals = [(), removed[:1], removed]
    agree(each(ways, lambda context: score(context, FITTING).A))
    for statistic in ("loss", "divergence", "rejection"):
        agree(each(ways, lambda context, s=statistic: measure(context, FITTING, removals, statistic=s).sums))


def test_damage_after_repair_is_that_of_the_cpu(ways, removed):
    def repaired(context):
        return measure_repaired(context, FITTING, JUDGING, [removed[:1], removed], statistic="divergence").sums

    agree(each(ways, repaired))


def test_two_passes_find_the_same_to_the_last_bit(ways, removed):
    def found(context):
        measured = [measure(context, FITTING, [(), removed], statistic=s).sums for s in ("loss", "divergence")]
        return np.concatenate([score(context, FITTING).A.ravel(), *(sums.ravel() for sums in measured)])

    first, second = (each({"gpu": ways["gpu"]}, found)["gpu"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_repaired_checkpoint_is_tested_and_is_that_of_the_cpu(ways, removed, tmp_path):
    written = {}
    for name, loaded in ways.items():
        repairs = repair_removals(context_of(loaded.stack, batch_tokens=24), [removed], FITTING, JUDGING)

        def test(place, loaded=loaded):
            return check_loaded(loaded.stack, removed, place, source=loaded.folder, stored=loaded.stored_dtype)

        report = write_removal(loaded, removed, repairs, tmp_path / name, None, test)["self_test"]
        assert report["passed"], report
        written[name] = load_file(tmp_path / name / "model.safetensors")
    expected = written.pop("cpu")
    for name, tensors in written.items():
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[key], rtol=2e-3, atol=2e-3, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in bfloat16, in which a GPU computes by default."""
    return tiny_folder(tmp_path_factory.mktemp("half") / "model", "llama", BLOCKS, dtype=torch.bfloat16)


def test_a_run_chooses_as_on_the_cpu(excise, half, tmp_path):
    found = []
    for device in ("cpu", GPU):
        where = ("--device", device, "--dtype", "float32", "--out", tmp_path / device)
        status, _, said = excise("run", half, "--remove", 2, *DATA, "--held-out", 8, *where, "--no-panel")
        assert status == 0, said
        facts = read_json(tmp_path / device / "run.json")
        assert facts["self_test"]["passed"]
        found.append(facts["removed"])
    assert found[0] == found[1]


@pytest.mark.fresh_process
def test_all_of_a_run_in_half_precision(excise, half, tmp_path):
    """As a user has it: devices and dtypes by default, the panel, healing, self-tests in fresh processes."""
    healing = ("--heal-steps", 3, "--heal-lr", 1e-3)
    out = tmp_path / "run"
    status, _, said = excise("run", half, "--remove", 2, *DATA, "--held-out", 8, *healing, "--out", out)
    assert status == 0, said
    facts = read_json(out / "run.json")
    assert facts["self_test"]["passed"]
    assert facts["self_test"]["level"] == "generates"
    status, text, said = excise("evaluate", out, "--with-original", "--speed", "--new-tokens", 8, "--json")
    assert status == 0, said
    speeds = [result for result in json.loads(text)["results"] if result["kind"] == "speed"]
    assert [result["settings"]["device"] for result in speeds] == [torch.cuda.get_device_name()] * 2


@pytest.mark.parametrize("teacher", ["online", "recorded", "nf4"])
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
def test_healing_learns(teacher, precision, excise, half, tmp_path):
    if teacher == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    pruned = tmp_path / "pruned"
    assert excise("prune", half, "--removed", "1-3", "--out", pruned, "--no-self-test")[0] == 0
    how = {
        "online": (),
        "recorded": ("--offline", tmp_path / "recorded"),
        "nf4": ("--teacher-precision", "nf4"),
    }[teacher]
    training = ("--held-out", 0.25, "--steps", 12, "--batch", 6, "--lr", 3e-3, "--precision", precision)
    status, text, said = excise(
        "heal", pruned, "--teacher", half, "--out", tmp_path / "healed", *DATA, *training, *how, "--json"
    )
    assert status == 0, said
    facts = json.loads(text)
    assert facts["self_test"]["passed"]
    curve = [entry["loss"] for entry in facts["curve"]]
    assert sum(curve[-4:]) < sum(curve[:4])


def test_a_speed_is_that_of_the_device(half):
    found = {device: speed(load(str(half), device=device).stack.model, fingerprint="x") for device in ("cpu", GPU)}
    assert found["cpu"].settings["device"] == "cpu"
    assert found["cpu"].settings["threads"] == torch.get_num_threads()
    assert found[GPU].settings["device"] == torch.cuda.get_device_name()
    assert found[GPU].metrics["peak_bytes"].value < 2**31 < found["cpu"].metrics["peak_bytes"].value * 8


def test_blocks_are_timed(excise, half, tmp_path):
    status, _, said = excise("times", half, "--new-tokens", 8, "--out", tmp_path / "times.json")
    assert status == 0, said
    assert json.loads((tmp_path / "times.json").read_text())["machine"]["device"] == torch.cuda.get_device_name()


def test_a_map_without_a_gpu_computes_as_a_cpu_does(half):
    kept = load(str(half), placement={"cpu": 2**30})
    assert kept.stack.device.type == "cpu"
    assert kept.stack.model.dtype == torch.float32
    assert load(str(half)).stack.model.dtype == torch.bfloat16
