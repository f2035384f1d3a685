"""Weights where a user wants them, by memory or by a map of his own: what waits gives what it gives in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import OffloadedWeightsLoader

from excise.errors import InputError
from excise.measuring.measure import measure
from excise.measuring.score import score
from excise.measuring.sweep import sweeps
from excise.models.identity import WeightFiles, loaded_from
from excise.models.loading import load
from excise.models.places import limited_map, own_map, waiting_places
from excise.models.residency import hold_when_called
from excise.repair.measured import measure_repaired
from excise.repair.several import repair_removals
from excise.settings import Loading, limits
from excise.surgery.check import check_loaded
from excise.surgery.checkpoint import write_pruned
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import tiny_folder, tiny_model

SAMPLES, JUDGING = random_samples([11, 7, 13, 5]), random_samples([8, 12, 6], seed=1)
BLOCKS = 5


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "nemotron_h")]


@pytest.fixture(scope="module", params=["llama", *SLOW])
def folder(request, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("placed") / "model", request.param, BLOCKS)


def room_for(model, path, blocks):
    """Bytes that hold everything but blocks, and some of these."""
    size = sum(p.numel() for p in model.parameters()) * 4
    of_blocks = [sum(p.numel() for p in block.parameters()) * 4 for block in model.get_submodule(path)]
    return size - sum(of_blocks[blocks:])


def ways(folder, place):
    """The checkpoint in memory; filled by memory for two blocks; and by a map with blocks 1 and 3 on the disk."""
    resident = load(str(folder))
    stack = resident.stack.architecture.stack
    limit = {"cpu": room_for(resident.stack.model, stack, 2)}
    weights = [name for name, _ in resident.stack.model.named_parameters() if not name.startswith(f"{stack}.")]
    modules = [name.removesuffix(".weight") for name in weights]
    chosen = {f"{stack}.{i}": "disk" if i in (1, 3) else "cpu" for i in range(BLOCKS)} | dict.fromkeys(modules, "cpu")
    place.write_text(json.dumps(chosen))
    return resident, load(str(folder), placement=limit), load(str(folder), placement=place)


@pytest.fixture(scope="module")
def loaded(folder, tmp_path_factory):
    return ways(folder, tmp_path_factory.mktemp("maps") / "map.json")


def waiting(loaded):
    return [any(p.is_meta for p in block.module.parameters()) for block in loaded.stack.blocks]


def test_blocks_wait_where_the_map_says(loaded):
    resident, filled, mapped = loaded
    assert not any(waiting(resident))
    assert waiting(filled) == [False, False, True, True, True]
    assert waiting(mapped) == [False, True, False, True, False]
    assert [sweeps(one.stack) for one in loaded] == [False, True, True]
    ids = torch.arange(9).unsqueeze(0)
    for one in (filled, mapped):
        torch.testing.assert_close(one.stack.hidden(ids), resident.stack.hidden(ids), rtol=0, atol=0)


def test_gradients_losses_and_repairs_are_those_of_the_model_in_memory(loaded):
    contexts = [context_of(one.stack, batch_tokens=24) for one in loaded]
    removals = [(1,), (2, 3), (1, 4)]
    gradients = [score(context, SAMPLES).A for context in contexts]
    losses = [measure(context, SAMPLES, [(), *removals]).sums for context in contexts]
    repaired = [
        measure_repaired(context, SAMPLES, JUDGING, removals, statistic="divergence").sums for context in contexts
    ]
    for resident, *others in (gradients, losses, repaired):
        for other in others:
            np.testing.assert_allclose(other, resident, rtol=1e-6, atol=2e-6)


def test_what_is_repaired_and_written_is_the_same(loaded, tmp_path):
    written = []
    for name, one in zip(("resident", "filled", "mapped"), loaded, strict=True):
        repairs = repair_removals(context_of(one.stack, batch_tokens=24), [(2, 4)], SAMPLES, JUDGING)

        def test(place, one=one):
            return check_loaded(one.stack, (2, 4), place, source=one.folder, stored=one.stored_dtype)

        # Repaired whether that helps or not, so that weights that wait are written as other ones.
        with repairs.applied(one.stack, (2, 4), always=True):
            facts = {"source": one.folder, "dtype": one.stored_dtype, "test": test}
            report = write_pruned(one.stack, (2, 4), tmp_path / name, **facts)["self_test"]
        assert report["passed"], report
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")})
    assert written[0] == written[1] == written[2]


@pytest.fixture(scope="module")
def skeleton():
    return tiny_model("llama", layers=3)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([], "to map modules to devices"),
        ({"model": 7}, "there is no GPU 7"),
        ({"model": "attic"}, "expected a GPU's number, cpu or disk, got 'attic'"),
        ({"model": "cpu", "heart": "cpu"}, "'heart', which holds no weights of this LlamaForCausalLM"),
        ({"": "cpu", "model.layers.1": "disk"}, "places 'model.layers.1' by itself and in ''"),
        (
            {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu"},
            r"leaves out 1 weights \(first: lm_",
        ),
        ({"model": "cpu", "lm_head": "disk"}, "lets lm_head.weight wait on 'disk'; only blocks"),
    ],
)
def test_a_map_that_cannot_be_is_refused(skeleton, given, error, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(given))
    with pytest.raises(InputError, match=error):
        own_map(skeleton, "model.layers", path)


def test_beside_a_gpu_the_machine_memory_is_where_weights_wait():
    assert waiting_places({"a": "cpu", "b": "disk"}) == {"disk"}
    assert waiting_places({"a": 0, "b": "cpu"}) == {"disk", "cpu"}


def test_memory_that_does_not_hold_what_every_pass_needs_is_refused(skeleton):
    with pytest.raises(InputError, match=r"embedding, norms and head take .* must stay on cpu"):
        limited_map(skeleton, "model.layers", torch.float32, {"cpu": 1000})
    with pytest.raises(InputError, match="there is no GPU 3"):
        limited_map(skeleton, "model.layers", torch.float32, {"3": 1000})


@pytest.mark.parametrize("text", ["20GiB", "cpu=lots", "cpu=1GB,cpu=2GB", "gpu0=1GB", "cpu="])
def test_sizes_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError, match="--max-memory expects each device once"):
        limits(text, "--max-memory")


def test_one_way_to_place_is_enough(folder, tmp_path):
    assert Loading(model="m", max_memory=("0=20GiB", "cpu=1KB")).loading()["placement"] == {
        "0": 20 * 2**30,
        "cpu": 1000,
    }
    with pytest.raises(InputError, match="expected one of --placement, --max-memory"):
        Loading(model="m", max_memory=("cpu=1GB",), placement="streamed")
    with pytest.raises(InputError, match="leave out --device cpu"):
        load(str(folder), device="cpu", placement={"cpu": 10**9})


def test_the_command_line_prunes_and_repairs_by_a_map(excise, tmp_path):
    model = tiny_folder(tmp_path / "model", "llama", 4)
    place, out = tmp_path / "map.json", tmp_path / "out"
    data = ("--samples", 6, "--held-out", 3, "--tokens", 16)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers": "disk"}
    place.write_text(json.dumps(places))
    status, printed, said = excise(
        "prune", model, "--removed", 2, "--repair", *data, "--device-map", place, "--out", out
    )
    assert status == 0, said
    assert "self-test" in printed
    status, _, said = excise("score", model, "--max-memory", "cpu=1KB", "--out", tmp_path / "A.safetensors")
    assert (status, "must stay on cpu" in said) == (2, True)


def test_weights_that_wait_in_memory_beside_their_device_are_measured_and_repaired_too(tmp_path):
    folder = tiny_folder(tmp_path / "model", "llama", 4)
    here, waits = (load(str(folder)).stack for _ in range(2))
    # As accelerate does it for a map with a GPU and "cpu"; here the CPU computes as well.
    names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(4))]
    offload = {name: name.startswith("model.layers") for name in names}
    stored = OffloadedWeightsLoader(state_dict={n: p.clone() for n, p in waits.model.state_dict().items()})
    attach_align_device_hook_on_blocks(waits.model, dict.fromkeys(names, torch.device("cpu")), offload, stored)
    hold_when_called([block.module for block in waits.blocks])
    loaded_from(waits.model, WeightFiles(list(folder.glob("*.safetensors")), {}))
    assert all(p.is_meta for block in waits.blocks for p in block.module.parameters())
    contexts = [context_of(stack, batch_tokens=24) for stack in (here, waits)]
    measured = [measure_repaired(c, SAMPLES, JUDGING, [(1,), (2, 3)], statistic="divergence") for c in contexts]
    np.testing.assert_allclose(measured[1].sums, measured[0].sums, rtol=1e-6, atol=2e-6)
    fits = [repair_removals(context, [(1, 2)], SAMPLES, JUDGING).fitted[1, 2] for context in contexts]
    assert fits[1].losses.repaired == pytest.approx(fits[0].losses.repaired, rel=1e-6)
    # A repair that was tried leaves nothing behind.
    ids = torch.arange(9).unsqueeze(0)
    torch.testing.assert_close(waits.hidden(ids), here.hidden(ids), rtol=0, atol=0)
