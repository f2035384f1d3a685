"""`excise export`."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from excise.cli.command import command
from excise.cli.export import export
from excise.errors import InputError, OutputError
from excise.ising.bridges.qubo import Ising, Qubo, safe_penalty, soft_penalty
from excise.ising.energies import Energy
from excise.ising.problem import Problem


@pytest.fixture
def run(tmp_path):
    random = np.random.default_rng(0).standard_normal((6, 6))
    np.save(tmp_path / "H.npy", random @ random.T)
    app = typer.Typer()
    app.command()(command(export))

    def call(*arguments):
        result = CliRunner().invoke(app, [str(tmp_path / "H.npy"), *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return call


def test_models_hold_the_problem_of_the_options(run, tmp_path):
    out = tmp_path / "m.out"
    problem = Problem(Energy.load(tmp_path / "H.npy"), 3, protected=(0,), forced=(2,))
    fixed = ("--remove", 3, "--protect", 0, "--force-blocks", 2, "--out", out, "--force")
    run("--format", "qubo", *fixed)
    assert Qubo.load(out).penalty == safe_penalty(problem)
    run("--format", "ising", *fixed, "--penalty", "soft")
    assert Ising.load(out).penalty == soft_penalty(problem)
    run("--format", "ising", *fixed, "--penalty", "12.5")
    model = Ising.load(out)
    assert (model.penalty, model.units, model.forced, model.count) == (12.5, (1, 3, 4, 5), (2,), 2)
    run("--format", "lp", *fixed)
    assert "forced_2: x2 = 1" in out.read_text()
    told = json.loads(run("--format", "qubo", *fixed, "--json"))
    assert told == {"out": str(out), "format": "qubo", "variables": 4, "penalty": safe_penalty(problem)}


def test_a_dimod_file(run, tmp_path):
    dimod = pytest.importorskip("dimod")
    run("--format", "bqm", "--remove", 2, "--out", tmp_path / "m.bqm")
    with (tmp_path / "m.bqm").open("rb") as file:
        assert dimod.BinaryQuadraticModel.from_file(file).num_variables == 6


def test_mistakes_are_named_and_nothing_is_overwritten(run, tmp_path):
    out = tmp_path / "m"
    with pytest.raises(InputError, match="--format in qubo, ising, bqm, lp"):
        run("--format", "mps", "--remove", 2, "--out", out)
    with pytest.raises(InputError, match="--penalty expects"):
        run("--format", "qubo", "--remove", 2, "--out", out, "--penalty", "hard")
    with pytest.raises(InputError, match="no penalty"):
        run("--format", "lp", "--remove", 2, "--out", out, "--penalty", "soft")
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        run("--format", "qubo", "--remove", 2, "--out", out)
    assert out.read_text() == "mine"
