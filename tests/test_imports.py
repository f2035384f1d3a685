"""The layout's promises: the combinatorial half stays light, and nothing imports the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import excise

SOURCE = Path(excise.__file__).parent
BRIDGES = ("bridges.gurobi", "bridges.scip", "bridges.highs", "bridges.dimod", "bridges.qubo", "bridges.lp")
SOLVING = ("energies", "problem", "spectrum", "solvers", "gradients", "report.spectra", "cli", "cli.solve")
LIGHT = (*SOLVING, *BRIDGES)
HEAVY = {"torch", "transformers", "datasets", "matplotlib"}


def test_the_combinatorial_half_and_the_command_line_import_without_torch():
    code = f"import sys\n{chr(10).join(f'import excise.{name}' for name in LIGHT)}\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_a_solve_imports_neither_torch_nor_transformers():
    code = (
        "import sys, numpy as np\nfrom excise.energies import Energy\nfrom excise.problem import Problem\n"
        "from excise.solvers import solve\nsolve(Problem(Energy(None, np.eye(6)), 2), states=3)\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_nothing_outside_the_command_line_imports_it():
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "cli") or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name and name.startswith("excise.cli") for name in names), path
