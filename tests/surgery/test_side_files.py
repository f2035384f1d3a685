"""A folder is a set: what is carried along names nothing that is not there."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from excise.errors import CheckpointError
from excise.models.loading import load
from excise.surgery.on_disk import prune_folder
from excise.surgery.side_files import without_absent_modules
from tests.tiny import tiny_folder, tiny_model


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


PROCESSOR = {"auto_map": {"AutoProcessor": "processing_mine.P"}, "size": 3}
POOLING = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
# What lies in the folder besides; of that what is carried, as it is or changed; and what is left out with a word.
SETS = {
    "an index of other weights": (
        {"pytorch_model.bin": "x", "pytorch_model.bin.index.json": {"weight_map": {"a": "pytorch_model.bin"}}},
        {},
        set(),
    ),
    "a list of other weights": (
        {"model.gguf": "x", "files.json": {"all": ["model.gguf", "config.json"]}},
        {},
        {"files.json"},
    ),
    "consolidated weights and their parameters": (
        {"consolidated.safetensors": "x", "params.json": {"n_layers": 6}},
        {},
        {"params.json"},
    ),
    "a training's state": (
        {"trainer_state.json": {"best_model_checkpoint": "out/checkpoint-5"}},
        {},
        {"trainer_state.json"},
    ),
    "a processor with its code": (
        {"preprocessor_config.json": PROCESSOR, "processing_mine.py": "x = 1"},
        {"preprocessor_config.json": PROCESSOR, "processing_mine.py": "x = 1"},
        set(),
    ),
    "a processor without its code": (
        {"preprocessor_config.json": PROCESSOR},
        {"preprocessor_config.json": {"size": 3}},
        set(),
    ),
    "code of another repository": (
        {"processor_config.json": {"auto_map": {"AutoProcessor": "org/name--processing.P"}}},
        {"processor_config.json": {"auto_map": {"AutoProcessor": "org/name--processing.P"}}},
        set(),
    ),
    "an embedding model's further modules": (
        {"modules.json": POOLING, "1_Pooling/config.json": {"a": 1}, "2_Dense/model.safetensors": "weights"},
        {"modules.json": POOLING, "1_Pooling/config.json": {"a": 1}, "2_Dense/model.safetensors": "weights"},
        set(),
    ),
    "an embedding model that lacks one": (
        {"modules.json": POOLING, "1_Pooling/config.json": {"a": 1}},
        {},
        {"modules.json"},
    ),
    "modules outside the folder": (
        {"modules.json": [{"path": "../.."}]},
        {},
        {"modules.json"},
    ),
    "JSON that is none": ({"notes.json": "no JSON"}, {"notes.json": "no JSON"}, set()),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
def test_sets_stay_whole(kind, tmp_path):
    files, carried, left_out = SETS[kind]
    source = put(tiny_folder(tmp_path / "model"), files)
    recipe = prune_folder(source, [1], tmp_path / "out")
    assert set(recipe.get("left_out", ())) == left_out
    for name in files:
        path = tmp_path / "out" / name
        assert path.exists() == (name in carried), name
        if name in carried:
            content = carried[name]
            assert (path.read_text() if isinstance(content, str) else json.loads(path.read_text())) == content
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{name}: " in card for name in left_out)


def test_a_config_names_no_code_that_is_not_there(tmp_path):
    source = tiny_folder(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    own = {"AutoConfig": "configuration_mine.C", "AutoModel": "lost.M"}
    pipelines = {"mine": {"impl": "lost.P"}, "theirs": {"impl": "configuration_mine.P"}}
    put(
        source, {"config.json": {**config, "auto_map": own, "custom_pipelines": pipelines}, "configuration_mine.py": ""}
    )
    prune_folder(source, [1], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoConfig": "configuration_mine.C"}
    assert written["custom_pipelines"] == {"theirs": {"impl": "configuration_mine.P"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"auto_map": {"AutoTokenizer": ["a.Slow", None]}}, {"auto_map": {"AutoTokenizer": ["a.Slow", None]}}),
        ({"auto_map": {"AutoTokenizer": ["b.Slow", "a.Fast"]}}, {"auto_map": {"AutoTokenizer": [None, "a.Fast"]}}),
        ({"auto_map": {"AutoTokenizer": ["b.Slow", None]}, "x": 1}, {"x": 1}),
        ({"text_config": {"auto_map": {"AutoModel": "b.M"}}}, {"text_config": {}}),
        ([{"auto_map": "strange"}], [{"auto_map": "strange"}]),
    ],
)
def test_references_to_code(given, expected):
    assert without_absent_modules(given, ["a.py"]) == expected


ADAPTERS = {
    "beside the weights": {"adapter_config.json": {"peft_type": "LORA", "r": 4}, "adapter_model.safetensors": None},
    "of which only the settings are left": {"adapter_config.json": {"peft_type": "IA3"}},
    "pickled": {"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.bin": "x"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_beside_weights_is_refused_before_anything_is_measured(kind, tmp_path):
    source = tiny_folder(tmp_path / "model")
    for name, content in ADAPTERS[kind].items():
        if content is None:
            save_file({"lora": tiny_model("llama", 1).lm_head.weight.detach()}, source / name)
        else:
            put(source, {name: content})
    for refused in (lambda: load(str(source)), lambda: prune_folder(source, [1], tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json.*merge_and_unload"):
            refused()
    assert not (tmp_path / "out").exists()


def test_what_a_link_leads_to_is_not_published(tmp_path):
    """`merges.txt → ~/.ssh/id_rsa` beside the weights; within the folder, and in the hub's cache, links are usual."""
    source = tiny_folder(tmp_path / "model", "llama")
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    (source / "notes.txt").write_text("notes")
    (source / "again.txt").symlink_to("notes.txt")
    written = prune_folder(source, [1], tmp_path / "out")
    assert "outside the folder" in written["left_out"]["merges.txt"]
    # The reason stands on the card, where this machine's folders are nobody's business.
    assert str(tmp_path) not in written["left_out"]["merges.txt"]
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert (tmp_path / "out" / "again.txt").read_text() == "notes"
    assert all("PRIVATE KEY" not in path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())


def test_a_snapshot_of_the_hubs_cache_is_carried_whole(tmp_path):
    source = tiny_folder(tmp_path / "plain", "llama")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    written = prune_folder(snapshot, [1], tmp_path / "out")
    assert "left_out" not in written
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (blobs / "tokenizer.json").read_bytes()
