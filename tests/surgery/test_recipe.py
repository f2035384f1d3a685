"""A recipe speaks of the first original, however many steps lie between."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from excise.models.loading import load
from excise.models.stack import find_stack
from excise.surgery.checkpoint import write_pruned
from excise.surgery.gguf import prune_gguf
from excise.surgery.on_disk import prune_folder
from excise.surgery.recipe import composed, read_recipe
from tests.gguf_files import write_gguf
from tests.tiny import tiny_folder, tiny_model

LAYERS = 6
QUICK = ("--samples", 30, "--tokens", 24, "--held-out", 0.2, "--steps", 2, "--batch", 4, "--no-checkpointing")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("first") / "model", "llama", layers=LAYERS)


@pytest.fixture
def steps(first, tmp_path, excise):
    """Run verbs one after the other, each on what the one before wrote; returns the last recipe and its folder."""

    def call(*verbs):
        place = first
        for number, (verb, *arguments) in enumerate(verbs):
            source, place = place, tmp_path / f"step-{number}"
            extra = ("--teacher", first, *QUICK) if verb == "heal" else ("--no-self-test",)
            code, _, err = excise(verb, source, *arguments, "--out", place, *extra)
            assert code == 0, err
        return SimpleNamespace(folder=place, **json.loads((place / "excise.json").read_text()))

    return call


PRUNE, AGAIN = ("prune", "--removed", "1,4"), ("prune", "--removed", "2")
# Steps → removed blocks and silent sublayers, by the first original's indices, and how many steps came before.
COMPOSED = {
    "once": ([PRUNE], [1, 4], [], 0),
    "twice": ([PRUNE, ("prune", "--removed", "1")], [1, 2, 4], [], 1),
    "from the top": ([PRUNE, ("prune", "--removed=-1")], [1, 4, 5], [], 1),
    "three times": ([PRUNE, AGAIN, ("prune", "--removed", "0")], [0, 1, 3, 4], [], 2),
    "merged the second time": ([PRUNE, (*AGAIN, "--merge", "figure")], [1, 3, 4], [], 1),
    "sublayers the second time": ([PRUNE, ("prune", "--removed-sublayers", "2.attention")], [1, 4], ["3.attention"], 1),
    "sublayers both times": (
        [
            ("prune", "--removed", "1", "--removed-sublayers", "4.attention"),
            ("prune", "--removed", "1", "--removed-sublayers", "0.feed-forward"),
        ],
        [1, 2],
        ["0.feed-forward", "4.attention"],
        1,
    ),
    "a block with a silent sublayer": (
        [("prune", "--removed-sublayers", "3.attention,4.attention"), ("prune", "--removed", "3")],
        [3],
        ["4.attention"],
        1,
    ),
    "a silent sublayer merged into": (
        [("prune", "--removed-sublayers", "3.attention"), ("prune", "--removed", "4", "--merge", "figure")],
        [4],
        [],
        1,
    ),
    "pruned, then healed": ([PRUNE, ("heal",)], [1, 4], [], 0),
    "pruned, healed and pruned": ([PRUNE, ("heal",), AGAIN], [1, 3, 4], [], 1),
    "healed twice": ([PRUNE, ("heal",), ("heal",)], [1, 4], [], 1),
    "healed with silent sublayers": (
        [("prune", "--removed", "1", "--removed-sublayers", "3.attention"), ("heal",)],
        [1],
        [],
        0,
    ),
}


@pytest.mark.parametrize("kind", COMPOSED)
def test_blocks_are_those_of_the_first_original(kind, steps, first):
    verbs, removed, silent, before = COMPOSED[kind]
    recipe = steps(*verbs)
    assert recipe.removed == removed
    assert recipe.original_blocks == [i for i in range(LAYERS) if i not in removed]
    assert (vars(recipe).get("zeroed_sublayers") or []) == silent
    assert len(vars(recipe).get("history", ())) == before
    assert recipe.original == str(first)
    original, weights = (load_file(place / "model.safetensors") for place in (first, recipe.folder))
    sizes = {"before": original, "after": weights}
    assert recipe.parameters == {key: sum(t.numel() for t in tensors.values()) for key, tensors in sizes.items()}
    if not {"heal", "--merge"} & {word for verb in verbs for word in verb}:
        for new, old in enumerate(recipe.original_blocks):
            name = "model.layers.{}.mlp.up_proj.weight"
            assert torch.equal(weights[name.format(new)], original[name.format(old)])
    card = (recipe.folder / "README.md").read_text()
    assert f"{LAYERS - len(removed)} of {LAYERS} blocks" in card
    assert ("| Steps |" in card) == bool(before)


def test_a_healing_before_the_last_pruning_is_not_this_checkpoints_own(steps):
    recipe = steps(PRUNE, ("heal",), AGAIN)
    assert not hasattr(recipe, "healing")
    assert recipe.history[0]["healing"]["steps"] == 2
    assert "excise.json keeps that" in recipe.left_out["heal.json"]
    assert not {"heal.json", "loss.svg"} & {path.name for path in recipe.folder.iterdir()}
    card = (recipe.folder / "README.md").read_text()
    assert "were healed on the way" in card
    assert "## Healing" not in card


def test_a_merger_and_a_repair_name_the_first_originals_blocks(steps):
    recipe = steps(PRUNE, (*AGAIN, "--merge", "figure"))
    assert recipe.merge["runs"] == [{"kept": 2, "removed": [3]}]
    once = {"original": "org/model", "removed": [1], "original_blocks": [0, 2, 3, 4]}
    repair = {"removed": [1], "steps": [{"block": 0, "kind": "feed-forward", "run": [1], "ridge": None}]}
    twice = composed(once, {"removed": [1], "original_blocks": [0, 2, 3], "repair": repair})
    assert twice["repair"]["removed"] == twice["repair"]["steps"][0]["run"] == [2]
    silent = {**once, "zeroed_sublayers": ["0.feed-forward", "0.attention"]}
    assert composed(silent, {"removed": [1], "original_blocks": [0, 2, 3], "repair": repair})["zeroed_sublayers"] == [
        "0.attention"
    ]


def test_gguf_files_compose_with_each_other_and_with_folders(tmp_path):
    write_gguf(tiny_model("llama", LAYERS), tmp_path / "first.gguf")
    prune_gguf(tmp_path / "first.gguf", [1, 4], tmp_path / "once.gguf")
    twice = prune_gguf(tmp_path / "once.gguf", [2], tmp_path / "twice.gguf")
    assert (twice["removed"], twice["original_blocks"]) == ([1, 3, 4], [0, 2, 5])
    told = {"original": "first.gguf", "removed": [1, 3, 4], "original_blocks": [0, 2, 5]}
    assert read_recipe(tmp_path / "twice.gguf") == told
    loaded = load(str(tmp_path / "twice.gguf"), reading=False)
    card = {"original": str(tmp_path / "twice.gguf")}
    recipe = write_pruned(loaded.stack, [0], tmp_path / "thrice", card=card, dtype=torch.float32)
    assert (recipe["removed"], recipe["original_blocks"], recipe["original"]) == ([0, 1, 3, 4], [2, 5], "first.gguf")


def test_an_older_recipe_is_read_and_what_it_does_not_say_stays_unknown(first, tmp_path):
    prune_folder(first, [1, 4], tmp_path / "once")
    old = {"original": "org/model", "removed": [1, 4], "original_blocks": [0, 2, 3, 5]}
    (tmp_path / "once" / "excise.json").write_text(json.dumps(old))
    recipe = prune_folder(tmp_path / "once", [0], tmp_path / "twice")
    assert (recipe["removed"], recipe["original"], recipe["parameters"]["before"]) == ([0, 1, 4], "org/model", None)
    assert recipe["history"] == [old]


# What may lie in a folder as excise.json, and belongs to another model or to none.
FOREIGN = {
    "of more blocks": {"removed": [1], "original_blocks": [0, 2, 3, 4, 5, 6, 7]},
    "of blocks named twice": {"removed": [6], "original_blocks": [0, 0, 1, 2, 3, 4]},
    "of no blocks": {"removed": "many"},
    "of text": {"removed": [], "original_blocks": list("abcdef")},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_recipe_of_another_model_is_left_out_with_a_word(kind, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=LAYERS)
    (source / "excise.json").write_text(json.dumps(FOREIGN[kind]))
    with pytest.warns(UserWarning, match="does not belong"):
        recipe = prune_folder(source, [1], tmp_path / "out")
    assert recipe["removed"] == [1]
    assert "history" not in recipe


def test_a_model_in_memory_knows_the_recipe_of_the_folder_it_came_from(first, tmp_path):
    prune_folder(first, [1, 4], tmp_path / "once")
    stack = find_stack(load(str(tmp_path / "once")).stack.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recipe = write_pruned(stack, [2], tmp_path / "twice")
    assert recipe["removed"] == [1, 3, 4]
