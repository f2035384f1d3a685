"""One writer: whatever changed in memory, config, files, names, layouts and dtypes are the original's."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from excise.errors import CheckpointError
from excise.models.loading import load
from excise.models.stack import find_stack
from excise.surgery.checkpoint import write_pruned
from excise.surgery.merge import merging
from excise.surgery.on_disk import prune_folder
from excise.surgery.sublayers import named_sublayers
from tests.hub import put_into_cache
from tests.quantised import quantise
from tests.released import ROPE_THETA, SIDE_FILES, released_folder
from tests.tiny import removable_pair, tiny_config, tiny_folder, tiny_model, tiny_tokenizer

MOE = ("mixtral", "qwen3_moe", "deepseek_v3", "jamba", "nemotron_h", "granitemoehybrid", "gpt_oss", "olmoe")


@contextlib.contextmanager
def scaled(stack, pattern):
    """Context in which the weights whose names match are half as large, which every dtype holds exactly."""
    weights = [p for name, p in stack.model.named_parameters() if re.search(pattern, name)]
    assert weights
    with torch.no_grad():
        for weight in weights:
            weight.mul_(0.5)
        yield
        for weight in weights:
            weight.mul_(2)


# What is done to the model → context, sublayers removed, and which tensors of the result must differ, all others equal.
CHANGES = {
    "nothing": (lambda stack, removed: contextlib.nullcontext(), [], r"never"),
    "repaired": (lambda stack, removed: scaled(stack, r"layers\.3\.mlp\.down_proj"), [], r"layers\.2\.mlp\.down_proj"),
    "merged": (lambda stack, removed: merging(stack, removed, "figure"), [], r"layers\.(0|2)\.\w+\.\w+_proj"),
    "sublayers": (lambda stack, removed: contextlib.nullcontext(), ["3.attention"], r"layers\.2\.self_attn\.o_proj"),
    "healed": (lambda stack, removed: scaled(stack, r""), [], r""),
    "a norm": (lambda stack, removed: scaled(stack, r"model\.norm"), [], r"model\.norm"),
    "the head": (lambda stack, removed: scaled(stack, r"lm_head"), [], r"lm_head"),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return released_folder(tmp_path_factory.mktemp("released") / "model")


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_changed_differs(change, released, tmp_path):
    context, names, pattern = CHANGES[change]
    loaded, removed = load(str(released)), [1, 4]
    assert loaded.stored_dtype == torch.bfloat16
    with context(loaded.stack, removed):
        write_pruned(
            loaded.stack,
            removed,
            tmp_path / "out",
            source=loaded.folder,
            sublayers=named_sublayers(loaded.stack, names),
            tokenizer=loaded.tokenizer,
            dtype=loaded.stored_dtype,
        )
    require_same_set(released, tmp_path / "out")
    prune_folder(released, removed, tmp_path / "plain")
    before, after = load_file(tmp_path / "plain" / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert list(before) == list(after)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) != bool(re.search(pattern, name)), name


def test_a_repair_changes_one_matrix_below_each_cut(tmp_path, excise):
    source, out = released_folder(tmp_path / "model", loud=(1, 4)), tmp_path / "out"
    repair = ("--repair", "--samples", 48, "--held-out", 16, "--tokens", 32, "--seed", 1)
    assert excise("prune", source, "--removed", "1,4", *repair, "--out", out)[0] == 0
    require_same_set(source, out)
    recipe = json.loads((out / "excise.json").read_text())
    prune_folder(source, [1, 4], tmp_path / "plain")
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path / "plain", out))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == len(recipe["repair"]["steps"]) > 0
    assert all(name.endswith("proj.weight") for name in changed)


def require_same_set(source, out, blocks=4):
    """Config and side files are the original's, but for the count of blocks."""
    config = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {**config, "num_hidden_layers": blocks}
    for name in (*SIDE_FILES, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_experts_spread_over_shards_are_changed_where_they_lie(tmp_path):
    """Parts of one fused weight in several files, of which one holds float32 where the others hold bfloat16."""
    source = tiny_folder(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    wide = next(name for name in weights if "experts.2.up_proj" in name)
    weights[wide] = weights[wide].float()
    places = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, source / file)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    loaded = load(str(source))
    with scaled(loaded.stack, r"experts"):
        write_pruned(loaded.stack, (), tmp_path / "out", source=loaded.folder)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[wide].dtype == torch.float32
    for name, tensor in weights.items():
        assert torch.equal(after[name], tensor / 2 if ".experts." in name else tensor), name


def test_a_changed_model_says_on_disk_what_it_says_in_memory(released, tmp_path):
    loaded = load(str(released))
    ids = torch.tensor([[7, 81, 250, 33, 9, 120]])
    with torch.no_grad(), scaled(loaded.stack, r"layers\.\d\.mlp"):
        expected = loaded.stack.model(ids).logits
        write_pruned(loaded.stack, (), tmp_path / "out", source=loaded.folder)
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("model_type", MOE)
def test_fused_experts_go_back_into_the_files_layout(model_type, tmp_path):
    source = tiny_folder(tmp_path / "model", model_type)
    removed = removable_pair(model_type)
    stack = find_stack(AutoModelForCausalLM.from_pretrained(source))
    with scaled(stack, r"experts"):
        write_pruned(stack, removed, tmp_path / "out", source=source)
        write_pruned(stack, removed, tmp_path / "by transformers")
    expected = load_file(tmp_path / "by transformers" / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    plain = prune_folder(source, removed, tmp_path / "plain")
    unchanged = load_file(tmp_path / "plain" / "model.safetensors")
    differing = [name for name in ours if not torch.equal(ours[name], unchanged[name])]
    assert differing
    assert all("experts" in name or "block_sparse_moe" in name for name in differing)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain["parameters"]["after"] == sum(parameter.numel() for parameter in model.parameters())


SPELLINGS = {  # model type, what is done to the names of a saved checkpoint
    "without the base model's prefix": ("llama", lambda name: name.removeprefix("model.")),
    "gpt2 without it": ("gpt2", lambda name: name.removeprefix("transformer.")),
    "experts without it": ("qwen3_moe", lambda name: name.removeprefix("model.")),
    "a hybrid's own": ("nemotron_h", lambda name: name.replace("backbone.", "model.", 1)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_changes_find_their_tensors_under_any_name(spelling, tmp_path):
    model_type, renamed = SPELLINGS[spelling]
    source = tiny_folder(tmp_path / "model", model_type)
    weights = {renamed(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    stack = find_stack(AutoModelForCausalLM.from_pretrained(source))
    with torch.no_grad(), scaled(stack, r"layers\.0\.|h\.0\.|experts"):
        expected = {name: tensor.clone() for name, tensor in stack.model.state_dict().items()}
        write_pruned(stack, (), tmp_path / "out", source=source)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_text_model_repaired_inside_a_multimodal_folder_keeps_its_towers(tmp_path):
    config = tiny_config("qwen3_5")
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 224}')
    loaded = load(str(tmp_path / "model"))
    with scaled(loaded.stack, r"layers\.0\.mlp"):
        write_pruned(loaded.stack, [1, 4], tmp_path / "out", source=loaded.folder)
    prune_folder(tmp_path / "model", [1, 4], tmp_path / "plain")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert [name for name in after if not torch.equal(after[name], before[name])] == [
        f"model.language_model.layers.0.mlp.{kind}_proj.weight" for kind in ("down", "gate", "up")
    ]
    assert any("visual" in name for name in after)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("form", ["modelopt", "fp8", "compressed-tensors"])
def test_a_quantised_original_whose_weights_change_becomes_plain(form, tmp_path):
    source = quantise(released_folder(tmp_path / "model"), form)
    loaded = load(str(source))
    with scaled(loaded.stack, r"layers\.0\.mlp"):
        expected = {name: tensor.clone() for name, tensor in loaded.stack.model.state_dict().items()}
        write_pruned(loaded.stack, (), tmp_path / "out", source=loaded.folder, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["dtype"]) == (ROPE_THETA, "float32")
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_a_hub_id_is_a_folder(released, tmp_path, monkeypatch, excise):
    snapshot = put_into_cache(released, "org/model", tmp_path / "cache", monkeypatch)
    loaded = load("org/model")
    assert (loaded.source, loaded.folder) == ("org/model", snapshot)
    out = tmp_path / "out"
    assert excise("prune", "org/model", "--removed", "1,4", "--out", out)[0] == 0
    require_same_set(released, out)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    recipe = json.loads((out / "excise.json").read_text())
    assert recipe["original"] == "org/model"
    merged = tmp_path / "merged"
    assert excise("prune", "org/model", "--removed", "1,4", "--merge", "code", "--out", merged)[0] == 0
    require_same_set(released, merged)


def test_a_weight_beyond_the_range_of_its_dtype_is_refused(tmp_path):
    source = tiny_folder(tmp_path / "model", dtype=torch.float16)
    loaded = load(str(source))
    with torch.no_grad():
        loaded.stack.model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"lm_head\.weight exceeds the range of F16"):
        write_pruned(loaded.stack, [0], tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_of_another_shape_than_its_folder_is_refused(model_type, tmp_path):
    source = tiny_folder(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(300)
    with pytest.raises(CheckpointError, match="save_pretrained"):
        write_pruned(find_stack(model), [0], tmp_path / "out", source=source)


def test_a_model_of_other_weights_than_its_folder_is_refused(tmp_path):
    source = tiny_folder(tmp_path / "model", "llama")
    biased = tiny_model("llama", attention_bias=True)
    with pytest.raises(CheckpointError, match="no place in its checkpoint"):
        write_pruned(find_stack(biased), [0], tmp_path / "out", source=source)


def test_parts_on_disk_are_taken_from_the_folder(tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", dtype=torch.bfloat16)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i in (2, 4) else "cpu" for i in range(6)}
    offload = {"device_map": device_map, "offload_folder": tmp_path / "offload", "dtype": torch.float32}
    stack = find_stack(AutoModelForCausalLM.from_pretrained(source, **offload))
    with scaled(stack, r"layers\.0\."):
        write_pruned(stack, [1, 4], tmp_path / "out", source=source)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(after[name.format(1)], before[name.format(2)])
    assert torch.equal(after[name.format(0)], before[name.format(0)] / 2)
