"""Folder to folder: the bytes of what stays are the original's, and the same as those of pruning in memory."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from excise.errors import ArchitectureError, CheckpointError, InputError, OutputError
from excise.models.stack import find_stack
from excise.surgery import on_disk
from excise.surgery.checkpoint import write_pruned
from excise.surgery.on_disk import prune_folder
from tests.tiny import MODEL_TYPES, removable_pair, tiny_folder

REMOVED = [1, 4]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("saved"), "llama", dtype=torch.bfloat16)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def tensors_of(folder):
    """Name → (dtype, shape, bytes) of all shards."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                assert name not in found
                found[name] = (entry["dtype"], entry["shape"], raw[8 + length + begin : 8 + length + end])
    return found


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_shards(folder, count=3):
    """Spread the tensors of a folder over shards, those of one block over several."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in weights.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_same_as_pruned_in_memory(model_type, tied, tmp_path):
    """A loaded model of which nothing changed is written as its folder would be, and transformers' saving agrees."""
    source = tiny_folder(tmp_path / "model", model_type, tied=tied)
    stack = find_stack(AutoModelForCausalLM.from_pretrained(source))
    removed = removable_pair(model_type)
    card = {"original": "org/x"}
    on_disk = prune_folder(source, removed, tmp_path / "disk", card=card)
    assert write_pruned(stack, removed, tmp_path / "loaded" / "disk", source=source, card=card) == on_disk
    assert contents(tmp_path / "loaded" / "disk") == contents(tmp_path / "disk")
    in_memory = write_pruned(stack, removed, tmp_path / "memory", card=card)
    assert tensors_of(tmp_path / "disk") == tensors_of(tmp_path / "memory")
    configs = [AutoConfig.from_pretrained(tmp_path / place).to_dict() for place in ("disk", "memory")]
    configs[0].pop("_name_or_path")
    assert {key: configs[1].get(key) for key in configs[0]} == configs[0]
    assert on_disk.pop("bytes")["after"] == sum(len(raw) for _, _, raw in tensors_of(tmp_path / "disk").values())
    assert on_disk == in_memory


def contents(folder):
    """Name → bytes of all files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_shards_in_shards_out(folder, tmp_path):
    expected = {k: v for k, v in tensors_of(folder).items() if not re.search(r"layers\.[14]\.", k)}
    prune_folder(as_shards(folder), REMOVED, tmp_path / "out", max_shard_size=60_000)
    shards = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        with safe_open(shard, framework="np") as file:
            names = set(file.keys())
            assert file.metadata() == {"format": "pt"}
        assert names == {name for name, place in weight_map.items() if place == shard.name}
    old = {"0": "0", "1": "2", "2": "3", "3": "5"}
    renamed = {
        re.sub(r"layers\.(\d)", lambda m: f"layers.{old[m[1]]}", k): v for k, v in tensors_of(tmp_path / "out").items()
    }
    assert renamed == expected


@pytest.mark.parametrize("removed", [[0], [5], [0, 1, 2, 3, 4], [-1, 2], []])
def test_any_choice_of_blocks(removed, folder, tmp_path):
    recipe = prune_folder(folder, removed, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    for new, old in enumerate(recipe["original_blocks"]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert after[name.format(new)] == before[name.format(old)]
    assert len(after) == len(before) - 9 * len(removed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6 - len(removed)


@pytest.mark.parametrize("removed", [list(range(6)), [6], [-7], [2, 2], [2, -4]])
def test_impossible_choices_are_refused(removed, folder, tmp_path):
    with pytest.raises(InputError):
        prune_folder(folder, removed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtypes_that_no_library_here_decodes_pass_through(tmp_path):
    """Packed 4-bit, 6-bit and float8 scales: bytes are bytes."""
    source = tiny_folder(tmp_path / "model", "llama", layers=3)
    extra = {
        f"model.layers.{i}.self_attn.{name}": (dtype, shape, bytes([7 * i + n]) * size)
        for i in range(3)
        for n, (name, dtype, shape, size) in enumerate(
            [("a", "F4", [4, 8], 16), ("b", "F6_E2M3", [8], 6), ("c", "F8_E8M0", [5], 5), ("d", "U8", [3, 1], 3)]
        )
    }
    add_raw(source / "model.safetensors", extra)
    prune_folder(source, [1], tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    for name, value in extra.items():
        if ".1." not in name:
            assert after[name.replace("layers.2", "layers.1")] == value


def add_raw(path, extra):
    tensors = {**tensors_of(path.parent), **extra}
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_fields_that_transformers_does_not_know_stay(folder, tmp_path):
    auto_map = {"AutoConfig": "configuration_mine.MyConfig"}
    (folder / "configuration_mine.py").write_text("raise SystemExit('executed')")
    edit_json(folder / "config.json", auto_map=auto_map, mine={"deep": [1] * 6}, torch_dtype="bfloat16")
    before = json.loads((folder / "config.json").read_text())
    prune_folder(folder, REMOVED, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**before, "num_hidden_layers": 4}
    assert (tmp_path / "out" / "configuration_mine.py").read_text() == "raise SystemExit('executed')"


def test_lists_that_the_original_left_to_a_default_are_written(tmp_path):
    """Qwen's windows begin at a block; counted from the new bottom, the default would lie elsewhere."""
    source = tiny_folder(tmp_path / "model", "qwen2", max_window_layers=3)
    types = json.loads((source / "config.json").read_text())["layer_types"]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_types"}))
    prune_folder(source, REMOVED, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["layer_types"] == [types[i] for i in (0, 2, 3, 5)]
    assert after["max_window_layers"] == 2


def test_every_spelling_of_the_block_count_follows(tmp_path):
    source = tiny_folder(tmp_path / "model", "gpt2")
    edit_json(source / "config.json", num_hidden_layers=6)
    prune_folder(source, REMOVED, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["n_layer"], after["num_hidden_layers"]) == (4, 4)


def test_both_spellings_of_tensors(tmp_path):
    """Old GPT-2 checkpoints, saved from the base model, have no prefix."""
    source = tiny_folder(tmp_path / "model", "gpt2", tied=True)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    prune_folder(source, REMOVED, tmp_path / "out")
    pruned, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for new, old in enumerate((0, 2, 3, 5)):
        name = "transformer.h.{}.mlp.c_fc.weight"
        assert torch.equal(pruned.state_dict()[name.format(new)], original[name.format(old)])


def test_blocks_for_multi_token_prediction_go(tmp_path):
    folder = tiny_folder(tmp_path / "model", "glm4_moe")
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    extra = {"model.layers.6.eh_proj.weight": ("U8", [2], b"mt")}
    add_raw(folder / "model.safetensors", extra)
    with pytest.raises(CheckpointError, match="tensors of block 6"):
        prune_folder(folder, REMOVED, tmp_path / "out")
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    prune_folder(folder, REMOVED, tmp_path / "out")
    assert not any("eh_proj" in name for name in tensors_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_other_files_are_carried_along_and_other_weights_are_not(folder, tmp_path):
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "LICENSE", "modeling_mine.py", "additional_chat_templates/tool.jinja"):
        (folder / name).write_text(f"content of {name}")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", ".gitattributes", "x.index.json"):
        (folder / name).write_text("stale")
    (folder / "original").mkdir()
    (folder / "original" / "tokenizer.model").write_text("stale")
    (folder / "README.md").write_text("the original's card")
    prune_folder(folder, REMOVED, tmp_path / "out", card={"original": "org/base", "seed": 5})
    out = tmp_path / "out"
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "modeling_mine.py", "additional_chat_templates/tool.jinja",
        "excise.json", "README.md",
    }  # fmt: skip
    assert (out / "modeling_mine.py").read_text() == "content of modeling_mine.py"
    assert "base_model: org/base" in (out / "README.md").read_text()
    assert json.loads((out / "excise.json").read_text())["seed"] == 5


def test_quantisation_settings_follow_wherever_they_stand(folder, tmp_path):
    ignore = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.5*"]
    edit_json(folder / "config.json", quantization_config={"quant_method": "modelopt", "ignore": ignore})
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ignore}}
    (folder / "hf_quant_config.json").write_text(json.dumps(modelopt))
    recipe = prune_folder(folder, REMOVED, tmp_path / "out")
    expected = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.3.*"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "modelopt", "ignore": expected}
    modelopt["quantization"]["exclude_modules"] = expected
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == modelopt
    assert "parameters" not in recipe


def hostile(folder, kind):
    """Make a checkpoint wrong in one way."""
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00003.safetensors"
    if kind in ("path", "absolute", "missing shard", "truncated shard", "missing tensor"):
        as_shards(folder)
    if kind in ("path", "absolute"):
        (folder.parent / "secret.safetensors").write_bytes(shard.read_bytes())
        place = "../secret.safetensors" if kind == "path" else str(folder.parent / "secret.safetensors")
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map={k: place if v == shard.name else v for k, v in weight_map.items()})
    elif kind == "missing shard":
        shard.unlink()
    elif kind == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif kind == "missing tensor":
        edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], "model.x": shard.name})
    elif kind == "missing block":
        edit_json(folder / "config.json", num_hidden_layers=7)
    elif kind == "blocks beyond the config":
        edit_json(folder / "config.json", num_hidden_layers=5)
    elif kind == "huge header":
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + raw[8:])
    elif kind == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "config":
        (folder / "config.json").write_text("[]")
    elif kind == "config field":
        edit_json(folder / "config.json", num_hidden_layers="six")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("path", r"names the file '\.\./secret"),
        ("absolute", "names the file '/"),
        ("missing shard", r"lacks model-00002-of-00003\.safetensors"),
        ("truncated shard", "is truncated or corrupt"),
        ("missing tensor", "model.x"),
        ("missing block", "no tensors of block 6"),
        ("blocks beyond the config", "tensors of block 5"),
        ("huge header", "its header claims"),
        ("pickle", "pickle weights only"),
        ("config", "no JSON object"),
        ("config field", "cannot read"),
    ],
)
def test_what_is_damaged_or_hostile_is_refused_and_nothing_written(kind, message, folder, tmp_path):
    hostile(folder, kind)
    with pytest.raises(CheckpointError, match=message):
        prune_folder(folder, REMOVED, tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists()


def test_unknown_and_place_dependent_architectures_are_refused(folder, tmp_path):
    edit_json(folder / "config.json", model_type="nonesuch")
    with pytest.raises(ArchitectureError, match="nonesuch"):
        prune_folder(folder, REMOVED, tmp_path / "out")
    source = tiny_folder(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ArchitectureError, match="scale_attn_by_inverse_layer_idx"):
        prune_folder(source, REMOVED, tmp_path / "out")
    with pytest.raises(InputError, match=r"no config\.json"):
        prune_folder(tmp_path, REMOVED, tmp_path / "out")


def test_destinations(folder, tmp_path):
    out = tmp_path / "out"
    prune_folder(folder, [0], out)
    with pytest.raises(OutputError, match="--force"):
        prune_folder(folder, [1], out)
    prune_folder(folder, [1], out, overwrite=True)
    assert json.loads((out / "excise.json").read_text())["removed"] == [1]
    with pytest.raises(OutputError, match="being read"):
        prune_folder(folder, [1], folder, overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not written by excise"):
        prune_folder(folder, [1], tmp_path / "thesis", overwrite=True)


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    """As a full disk is: the system refuses bytes in the midst of writing the weights."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        with pytest.raises(OutputError, match="larger than files may be there"):
            prune_folder(folder, REMOVED, tmp_path / "place" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "place").iterdir()) == []


def test_what_cannot_fit_is_refused_before_the_first_byte(tmp_path):
    with pytest.raises(OutputError, match="are free there"):
        on_disk.require_space(tmp_path / "a" / "b", 2**60)


def test_an_interrupt_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_disk, "carry_along", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, REMOVED, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_infinity_in_a_config_stays_infinity(tmp_path):
    source = tiny_folder(tmp_path / "model", "mamba2", layers=4)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    prune_folder(source, [1], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]
