"""Folders, GGUF files and everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.errors import ArchitectureError, CheckpointError, InputError
from excise.models.loading import device_map, load
from tests.gguf_files import write_gguf
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer

PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("saved"), layers=3, dtype=torch.bfloat16)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_whole(folder):
    loaded = load(str(folder))
    assert loaded.source == str(folder)
    assert loaded.stored_dtype == torch.bfloat16
    assert len(loaded.stack.blocks) == 3
    assert not loaded.stack.model.training
    assert loaded.tokenizer("fox")["input_ids"] == tiny_tokenizer()("fox")["input_ids"]
    with torch.no_grad():
        expected = tiny_model("llama", 3, dtype=torch.bfloat16).float()(PROMPT).logits
        assert torch.equal(loaded.stack.model(PROMPT).logits, expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_dtype_is_that_of_the_computation(folder, name):
    loaded = load(str(folder), dtype=name, device="cpu")
    assert loaded.stack.model.dtype == getattr(torch, name)
    assert loaded.stored_dtype == torch.bfloat16


def test_options_of_no_known_kind_are_refused(folder):
    with pytest.raises(InputError, match=r"expected a dtype in auto, .*, got 'int8'"):
        load(str(folder), dtype="int8")
    with pytest.raises(InputError, match=r"expected a device such as .*, got 'toaster'"):
        load(str(folder), device="toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder):
    with pytest.raises(InputError, match="sees no GPU"):
        load(str(folder), device="cuda:0")


def test_sources_that_are_not_there_or_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "absent", "no folder"),
        (tmp_path / "absent.gguf", "no GGUF file"),
        (tmp_path / "notes.txt", "file of no known kind"),
        (tmp_path / "empty", "has no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            load(str(source))


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickle files .* are not read"):
        load(str(folder))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.9])
def test_a_truncated_shard_is_named(folder, keep):
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load(str(folder))


def test_a_missing_tensor_is_named(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=f"1 weights are not in the checkpoint.*{name}"):
        load(str(folder))


def test_a_missing_shard_is_an_error(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in weights.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(load(str(folder)).stack.blocks) == 3
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(str(folder))


def test_a_config_that_does_not_fit_the_weights_is_an_error(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="in the checkpoint but not in the model"):
        load(str(folder))
    edit_config(folder, num_hidden_layers=3, intermediate_size=48)
    with pytest.raises(CheckpointError, match="have another shape than the config says"):
        load(str(folder))


def test_an_architecture_excise_does_not_know_is_named(folder):
    edit_config(folder, model_type="stablelm")
    with pytest.raises(ArchitectureError, match=r"'stablelm' is not known.*CONTRIBUTING\.md"):
        load(str(folder))


def test_an_architecture_transformers_does_not_know_is_named(folder):
    edit_config(folder, model_type="nonesuch")
    with pytest.raises(ArchitectureError, match="nonesuch"):
        load(str(folder))


def test_a_broken_config_is_an_error(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(CheckpointError, match="cannot load"):
        load(str(folder))


def test_a_gguf_file_loads(tmp_path):
    model = tiny_model("llama", 3)
    write_gguf(model, tmp_path / "tiny.gguf")
    loaded = load(str(tmp_path / "tiny.gguf"))
    assert len(loaded.stack.blocks) == 3
    assert loaded.stored_dtype == torch.float32
    assert loaded.tokenizer("The fox")["input_ids"] == tiny_tokenizer()("The fox")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.stack.model(PROMPT).logits, model(PROMPT).logits, rtol=1e-5, atol=1e-5)


def test_a_damaged_gguf_file_is_an_error(tmp_path):
    write_gguf(tiny_model("llama", 3), tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for damaged in (content[: len(content) // 2], b"no gguf at all" * 100):
        (tmp_path / "tiny.gguf").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot load"):
            load(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(("rank", "place"), [("0", "cuda:0"), ("1", "cuda:1"), ("2", "auto")])
def test_each_of_several_processes_takes_a_gpu_of_its_own(rank, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_map("auto", "auto") == "auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_map("auto", "auto") == place
    assert device_map("auto", "cuda:1") == "cuda:1"
