"""LP files, read back by solvers that are not ours."""

import numpy as np
import pytest

from excise.ising.bridges.lp import write_lp
from excise.ising.energies import Energy
from excise.ising.problem import Problem, at_most, weigh_at_least
from excise.ising.solvers import solve


def energy_of(n, seed):
    random = np.random.default_rng(seed)
    J = random.standard_normal((n, n)) * 10.0 ** (seed - 2)
    return Energy(J[0], J + J.T, labels=[f"block {i}\nattention" for i in range(n)])


PROBLEMS = {
    "plain": Problem(energy_of(8, 0), 3),
    "semidefinite": Problem(Energy(None, energy_of(7, 1).J @ energy_of(7, 1).J), 4),
    "linear": Problem(Energy([1.0, -2.0, 0.0], np.zeros((3, 3))), 2),
    "zero": Problem(Energy(None, np.zeros((3, 3))), 2),
    "fixed": Problem(energy_of(9, 2), 4, protected=(0, 8), forced=(5,)),
    "constraints": Problem(
        energy_of(30, 3), None, constraints=(weigh_at_least(range(1, 31), 29.5), at_most(range(20, 30), 1, 30))
    ),
}


def optimum_of_gurobi(path):
    gurobi = pytest.importorskip("gurobipy")
    with gurobi.Env(params={"OutputFlag": 0}) as environment, gurobi.read(str(path), environment) as model:
        model.Params.MIPGap = 0
        model.Params.TimeLimit = 20
        model.optimize()
        return {v.VarName for v in model.getVars() if v.X > 0.5}, model.ObjVal


def optimum_of_scip(path):
    scip = pytest.importorskip("pyscipopt")
    model = scip.Model()
    model.hideOutput()
    model.readProblem(str(path))
    model.setParam("limits/time", 20)
    model.optimize()
    return {v.name for v in model.getVars() if v.name.startswith("x") and model.getVal(v) > 0.5}, model.getObjVal()


@pytest.mark.parametrize("read", [optimum_of_gurobi, optimum_of_scip])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_reader_of_the_file_finds_our_optimum(read, name, tmp_path):
    problem = PROBLEMS[name]
    path = tmp_path / "problem.lp"
    write_lp(problem, path)
    chosen, value = read(path)
    removed = [int(variable[1:]) for variable in chosen]
    ground = solve(problem, states=1, solver="branch-and-bound")[0]
    assert problem.allows(removed)
    assert value == pytest.approx(ground.energy, rel=1e-5, abs=1e-6)
    assert problem.energy.energy(removed) == pytest.approx(ground.energy, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_lines_are_short_and_every_constraint_is_a_row(name, tmp_path):
    problem = PROBLEMS[name]
    write_lp(problem, tmp_path / "problem.lp")
    text = (tmp_path / "problem.lp").read_text()
    assert max(map(len, text.splitlines())) <= 200
    rows = text.partition("Subject To")[2]
    assert rows.count(":") == 1 + len(problem.protected) + len(problem.forced) + len(problem.constraints)
