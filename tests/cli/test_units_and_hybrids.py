"""Units other than blocks from solve to prune, MoE-only removal of a Nemotron-H, and blocks that must stay."""

from __future__ import annotations

import json

import numpy as np
from tests.tiny import tiny_folder, tiny_model
from typer.testing import CliRunner

from excise.cli import app
from excise.ising.gradients import Gradients
from excise.models.stack import find_stack
from excise.surgery.sublayers import named_sublayers


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def saved_gradients(model_type, path):
    """Random gradients with the gates of a tiny model."""
    sublayers = find_stack(tiny_model(model_type)).sublayers
    A = np.random.default_rng(0).normal(size=(40, len(sublayers)))
    names = tuple(f"sample:{i}" for i in range(40))
    gradients = Gradients(A, np.zeros(40), tuple(s.block for s in sublayers), tuple(s.kind for s in sublayers), names)
    gradients.save(path)
    return gradients


def test_attention_alone_from_solve_to_checkpoint(tmp_path):
    gradients = saved_gradients("llama", tmp_path / "gradients.safetensors")
    spectrum, out = tmp_path / "attention.json", tmp_path / "out"
    invoke("solve", tmp_path / "gradients.safetensors", "--granularity", "attention", "--remove", 2, "--out", spectrum)
    found = json.loads(spectrum.read_text())
    assert found["labels"] == [f"{block}.attention" for block in range(6)]
    energies = np.full((6, 6), np.nan)
    columns = gradients.A[:, 0::2]
    for i in range(6):
        for j in range(i):
            energies[i, j] = ((columns[:, i] + columns[:, j]) ** 2).mean()
    i, j = np.unravel_index(np.nanargmin(energies), energies.shape)
    assert found["states"][0]["removed"] == [j, i]
    folder = tiny_folder(tmp_path / "model", "llama")
    invoke("prune", folder, "--spectrum", spectrum, "--out", out, "--no-self-test")
    recipe = json.loads((out / "excise.json").read_text())
    assert (recipe["removed"], recipe["zeroed_sublayers"]) == ([], [f"{j}.attention", f"{i}.attention"])


def test_experts_alone_from_a_nemotron_h(tmp_path):
    """As in the paper; its config says the same in three ways."""
    saved_gradients("nemotron_h", tmp_path / "gradients.safetensors")
    spectrum, out = tmp_path / "moe.json", tmp_path / "out"
    invoke("solve", tmp_path / "gradients.safetensors", "--kinds", "moe", "--remove", 2, "--out", spectrum)
    assert json.loads(spectrum.read_text())["states"][0]["removed"] == [1, 5]
    folder = tiny_folder(tmp_path / "model", "nemotron_h")
    invoke("prune", folder, "--spectrum", spectrum, "--out", out, "--no-self-test")
    config = json.loads((out / "config.json").read_text())
    assert config["layers_block_type"] == ["linear_attention", "linear_attention", "full_attention", "mlp"]
    assert (config["num_hidden_layers"], config["hybrid_override_pattern"]) == (4, "MM*-")
    stack = find_stack(tiny_model("nemotron_h"))
    assert named_sublayers(stack, ["1.moe", "5.moe"]) == (1, 5)


def test_inspect_says_what_must_stay(tmp_path):
    folder = tiny_folder(tmp_path / "gemma", "gemma4_text")
    facts = json.loads(invoke("inspect", folder, "--json"))
    assert [block["index"] for block in facts["blocks"] if not block["removable"]] == [2, 3, 5]
    assert "block 2 stays: blocks 4 use its keys and values" in invoke("inspect", folder)
    hybrid = invoke("inspect", tiny_folder(tmp_path / "lfm2", "lfm2"))
    assert "one of blocks 2, 5 must stay" in hybrid
