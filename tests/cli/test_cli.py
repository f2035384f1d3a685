"""The command line: verbs chained through their artefacts, and errors that say what to do."""

import json
import sys

import numpy as np
import pytest
from tests.tiny import tiny_folder

from excise.cli import main
from excise.cli.options import indices
from excise.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), "llama", layers=5))


@pytest.fixture
def excise(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["excise", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def test_the_stages_chain_through_their_files(excise, model, tmp_path):
    gradients, spectrum, verified = tmp_path / "g.safetensors", tmp_path / "spectrum-fisher.json", tmp_path / "v.json"
    assert excise("score", model, "--samples", 24, "--tokens", 24, "--out", gradients)[0] == 0
    code, out, _ = excise("solve", gradients, "--remove", 2, "--states", 3, "--out", spectrum, "--json")
    states = json.loads(out)
    assert code == 0
    assert states["certified"]
    assert len(states["states"]) == 3
    code, out, _ = excise(
        "verify", model, "--spectrum", spectrum, "--removed", "1-2", "--gradients", gradients,
        "--samples", 4, "--tokens", 24, "--out", verified, "--json",
    )  # fmt: skip
    measured = json.loads(out)
    assert code == 0
    assert {c["method"] for c in measured["candidates"]} == {"fisher:0", "fisher:1", "fisher:2", "given:1-2"}
    assert measured == json.loads(verified.read_text())
    code, out, _ = excise("prune", model, "--spectrum", spectrum, "--state", 1, "--out", tmp_path / "small", "--json")
    pruned = json.loads(out)
    assert code == 0
    assert pruned["removed"] == states["states"][1]["removed"]
    assert pruned["self_test"]["loads_in_stock_transformers"]
    assert not list(tmp_path.glob(".*work*"))


def test_run_prints_what_it_writes(excise, model, tmp_path):
    options = ("--remove", 2, "--samples", 24, "--held-out", 4, "--tokens", 24, "--out", tmp_path / "run")
    code, out, _ = excise("run", model, *options, "--json")
    assert code == 0
    assert json.loads(out)["removed"] == json.loads((tmp_path / "run" / "run.json").read_text())["removed"]
    code, _, err = excise("run", model, *options)
    assert code == 2
    assert "--force" in err


def test_inspect_lists_the_blocks(excise, model):
    code, out, _ = excise("inspect", model, "--json")
    blocks = json.loads(out)["blocks"]
    assert code == 0
    assert [block["index"] for block in blocks] == list(range(5))
    assert blocks[0]["sublayers"] == ["attention", "feed-forward"]
    assert excise("inspect", model)[1].count("LlamaDecoderLayer") == 5


def test_solve_takes_any_matrix(excise, tmp_path):
    np.save(tmp_path / "H.npy", np.diag([3.0, 1.0, 2.0, 5.0]))
    code, out, _ = excise("solve", "--hessian", tmp_path / "H.npy", "--remove", 2, "--json")
    assert code == 0
    assert json.loads(out)["states"][0] == {"removed": [1, 2], "energy": 3.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("solve", "--remove", "2"), "either a gradients file or --hessian"),
        (("inspect", "/no/such/folder"), "no folder"),
        (("prune", "x", "--out", "y"), "either --removed"),
        (("run", "x", "--remove", "2", "--out", "y", "--protect", "a"), "--protect expects indices"),
        (("score", "x", "--part", "3/2"), "RANK < PARTS"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(excise, arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = excise(*arguments)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert out == ""


def test_interrupt_exits_with_130(excise, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("excise.cli.terminal.load_model", interrupted)
    code, _, err = excise("inspect", "x")
    assert code == 130
    assert "goes on where it stopped" in err


def test_indices_read_lists_and_ranges():
    assert indices("0,3-5,-1", "--protect") == (0, 3, 4, 5, -1)
    assert indices("", "--protect") == ()
    with pytest.raises(InputError, match="--protect expects indices"):
        indices("1,x", "--protect")
