"""A model's identity follows every byte of its weights, wherever they are and however they were changed."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref

import accelerate
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from excise.errors import CheckpointError
from excise.measuring.measure import measure
from excise.models.headers import read_checkpoint
from excise.models.identity import model_identity
from excise.models.loading import load
from excise.models.stack import bypass
from excise.repair.streams import swapped
from excise.surgery.checkpoint import pruned, write_pruned
from excise.surgery.merge import Run, merged
from excise.surgery.sublayers import zeroed
from tests.contexts import context_of
from tests.gguf_files import write_gguf
from tests.random_samples import random_samples
from tests.tiny import tiny_folder, tiny_model

PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120]])
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in several shards, in bfloat16."""
    folder = tiny_folder(tmp_path_factory.mktemp("saved"), layers=3, dtype=torch.bfloat16)
    model = load(str(folder), dtype="bfloat16").stack.model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def loaded_model(folder, **options):
    return load(str(folder), **options).stack.model


def identity_of(folder, **options):
    return model_identity(loaded_model(folder, **options))


def flip_byte(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))  # the lowest bit of a mantissa: nothing overflows


# --- files


def test_a_model_is_the_same_whenever_and_wherever_it_is_loaded_from(folder, tmp_path):
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert identity_of(folder) == identity_of(folder) == identity_of(elsewhere)


def test_every_dtype_of_the_computation_is_another_model(folder):
    assert len({identity_of(folder, dtype=name) for name in ("float32", "bfloat16", "float64")}) == 3


def test_every_byte_of_every_shard_counts(folder):
    found = {identity_of(folder)}
    tensors = read_checkpoint(folder).tensors
    places = [(t.shard, t.start) for t in tensors]
    places += [(t.shard, t.start + t.bytes - 2) for t in tensors if t.shard != tensors[0].shard]  # little-endian
    for shard, offset in places:
        flip_byte(shard, offset)
        found.add(identity_of(folder))
        flip_byte(shard, offset)
    assert len(found) == 1 + len(places)
    assert identity_of(folder) in found


def test_the_config_counts_and_where_it_came_from_does_not(folder):
    before, path = identity_of(folder), folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "5.99", "_name_or_path": "other"}))
    assert identity_of(folder) == before
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert identity_of(folder) != before


def test_a_gguf_file_is_its_bytes(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama", 2), path)
    before = identity_of(path)
    assert identity_of(path) == before
    flip_byte(path, path.stat().st_size - 4)
    assert identity_of(path) != before


def test_weights_replaced_after_loading_are_known_by_what_is_in_memory(folder):
    model, twin = loaded_model(folder), copy.deepcopy(loaded_model(folder))
    tensor = read_checkpoint(folder).tensors[0]
    flip_byte(tensor.shard, tensor.start)
    assert model_identity(model) == model_identity(twin)  # the twin was never told of any file
    assert model_identity(model) != identity_of(folder)


def test_a_model_of_the_hub_is_the_files_of_its_snapshot(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "hub" / "models--org--tiny"
    snapshot, blobs = store / "snapshots" / commit, store / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = identity_of("org/tiny")
    assert before == identity_of(folder)
    tensor = read_checkpoint(snapshot).tensors[0]
    flip_byte(tensor.shard, tensor.start)
    assert identity_of("org/tiny") != before


# --- memory


def in_place(model):
    with torch.no_grad():
        model.get_parameter(DOWN).mul_(1.01)


def last_element_of_the_largest(model):
    largest = max(model.parameters(), key=torch.numel)
    with torch.no_grad():
        largest.view(-1)[-1] += 1


def one_element_in_the_middle(model):
    with torch.no_grad():
        model.get_parameter(DOWN)[17, 5] += 1


def other_data(model):
    parameter = model.get_parameter(DOWN)
    parameter.data = parameter.data + 1


def past_the_counter(model):
    model.get_parameter(DOWN).data.mul_(1.01)


def other_parameter(model):
    module = model.get_submodule(DOWN.removesuffix(".weight"))
    with torch.no_grad():
        data = module.weight.data.mul_(1.01)  # its storage, and a version counter that starts anew
    module.weight = nn.Parameter(data)


def other_state(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def optimiser_step(model, **options):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def fused_optimiser_step(model):
    optimiser_step(model, fused=True)


def other_dtype(model):
    model.to(torch.float64)


CHANGES = (
    in_place,
    last_element_of_the_largest,
    one_element_in_the_middle,
    other_data,
    past_the_counter,
    other_parameter,
    other_state,
    optimiser_step,
    fused_optimiser_step,
    other_dtype,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("origin", ["files", "memory"])
def test_a_change_in_memory_makes_another_model(folder, origin, change):
    model = loaded_model(folder) if origin == "files" else tiny_model("llama", 3)
    before = model_identity(model)
    assert model_identity(model) == before
    change(model)
    after = model_identity(model)
    assert after != before
    assert model_identity(model) == after
    change(model)
    assert (model_identity(model) == after) == (change is other_dtype)  # the only one without effect the second time


def test_a_model_in_memory_is_what_it_holds():
    model, twin, other = tiny_model("llama", 2), tiny_model("llama", 2), tiny_model("llama", 2, seed=1)
    assert model_identity(model) == model_identity(twin) != model_identity(other)
    twin.load_state_dict(other.state_dict())
    assert model_identity(twin) == model_identity(other)


def test_a_few_elements_written_past_the_counter_need_to_be_told():
    model = tiny_model("llama", 2)
    before, parameter = model_identity(model), model.get_parameter(DOWN)
    parameter.data[17, 5] += 1
    torch.autograd.graph.increment_version(parameter)
    assert model_identity(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tied_weights_and_buffers_count(dtype):
    tied = tiny_model("llama", 2, tied=True, dtype=dtype)
    before = model_identity(tied)
    with torch.no_grad():
        tied.get_output_embeddings().weight[200, 3] += 1
    assert model_identity(tied) != before
    buffered = tiny_model("deepseek_v3", 3, dtype=dtype)
    name = next(n for n, _ in buffered.named_buffers() if n.endswith("e_score_correction_bias"))
    before = model_identity(buffered)
    buffered.get_buffer(name)[-1] += 1
    assert model_identity(buffered) != before


def test_a_forward_pass_and_a_frozen_weight_change_nothing(folder):
    model = loaded_model(folder)
    before = model_identity(model)
    model(PROMPT)
    model.requires_grad_(False)
    assert model_identity(model) == before


def test_memory_that_is_used_again_is_not_mistaken_for_what_it_held():
    model = tiny_model("llama", 2)
    parameter, addresses, found = model.get_parameter(DOWN), [], {}
    for number in range(40):
        parameter.data = torch.full_like(parameter, number // 2)
        addresses.append(parameter.data_ptr())
        found.setdefault(number // 2, set()).add(model_identity(model))
    assert len(set(addresses)) < len(addresses)  # the allocator did give the same memory again
    assert all(len(identities) == 1 for identities in found.values())
    assert len(set.union(*found.values())) == len(found)


def test_what_is_known_of_a_model_keeps_none_of_it_alive(folder):
    model = loaded_model(folder)
    model_identity(model)
    parameter = model.get_parameter(DOWN)
    storage = StorageWeakRef(parameter.untyped_storage())
    parameter.data = torch.zeros_like(parameter)
    assert storage.expired()
    whole = weakref.ref(model)
    del model, parameter
    gc.collect()
    assert whole() is None


# --- states that pass


def test_a_repair_is_another_model_while_it_is_in(folder):
    model = loaded_model(folder)
    before, weight = model_identity(model), model.get_parameter(DOWN).detach().clone()
    seen = []
    for factor in (1.5, 1.5, 2.0):
        with swapped(model, {DOWN: weight * factor}):
            seen.append(model_identity(model))
        assert model_identity(model) == before
    assert seen[0] == seen[1]
    assert len({before, *seen}) == 3
    again = loaded_model(folder)
    with swapped(again, {DOWN: weight * 1.5}):
        assert model_identity(again) == seen[0]  # in another process, too: a ledger finds it again
    with swapped(model, {DOWN: weight * 1.5}), swapped(model, {DOWN: weight * 2.0}):
        assert model_identity(model) == seen[2]


STATES = {
    "zeroed": lambda stack: zeroed(stack, [2]),
    "merged": lambda stack: merged(stack, [Run(0, (1,))], "figure"),
    "pruned": lambda stack: pruned(stack, (1,)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_model_operated_on_is_another_until_it_is_put_back(folder, name):
    stack = load(str(folder)).stack
    before = model_identity(stack.model)
    with STATES[name](stack):
        inside = model_identity(stack.model)
        assert inside != before
    assert model_identity(stack.model) == before
    with STATES[name](stack):
        assert model_identity(stack.model) == inside
    with bypass(stack, (1,)):  # a hook, no change of the model
        assert model_identity(stack.model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writing_a_checkpoint_leaves_the_model_what_it_was(folder, tmp_path, dtype):
    loaded = load(str(folder))
    before, twin = model_identity(loaded.stack.model), copy.deepcopy(loaded.stack.model)
    write_pruned(loaded.stack, (1,), tmp_path / "out", tokenizer=loaded.tokenizer, dtype=dtype)
    assert model_identity(loaded.stack.model) == before
    assert all(torch.equal(a, b) for a, b in zip(loaded.stack.model.parameters(), twin.parameters(), strict=True))


# --- offloaded


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_an_offloaded_model_is_its_files(folder, whole):
    model = loaded_model(folder)
    before = model_identity(model)
    parts = [model] if whole else list(model.model.layers)
    for part in parts:
        accelerate.cpu_offload(part, execution_device="cpu")
    assert model.get_parameter(DOWN).is_meta
    # Parts that were offloaded on their own are in their hooks under names of their own.
    assert (model_identity(model) == before) == whole
    offloaded = model_identity(model)
    model(PROMPT)
    assert model_identity(model) == offloaded


def test_an_offloaded_model_whose_files_have_changed_is_refused(folder):
    model = loaded_model(folder)
    accelerate.cpu_offload(model, execution_device="cpu")
    tensor = read_checkpoint(folder).tensors[0]
    flip_byte(tensor.shard, tensor.start)
    with pytest.raises(CheckpointError, match="changed since"):
        model_identity(model)


def test_weights_that_are_nowhere_are_refused(folder):
    with pytest.raises(CheckpointError, match="meta device"):
        model_identity(tiny_model("llama", 2).to("meta"))
    with pytest.raises(CheckpointError, match="meta device"):
        model_identity(loaded_model(folder).to("meta"))  # no hook brings them back


# --- what it is for


def test_a_changed_element_is_measured_again(folder, tmp_path):
    samples, kept = random_samples((11, 7, 9)), tmp_path / "kept"

    def damage(kept=None):
        stack = load(str(folder)).stack
        found = measure(context_of(stack, kept), samples, [(), (1,)])
        return found.loss((1,)) - found.loss()

    before = damage(kept)
    assert damage(kept) == before
    shard = next(t for t in read_checkpoint(folder).tensors if t.name == DOWN)
    with shard.shard.open("r+b") as file:
        file.seek(shard.start + shard.bytes - 2)
        file.write(b"\xc8\x42")  # 100 in bfloat16
    after = damage(kept)
    assert after == damage()
    assert abs(after - before) > 1e-3
