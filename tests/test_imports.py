"""The layout's promises: the combinatorial half stays light, and nothing imports the command line."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import excise

SOURCE = Path(excise.__file__).parent
LIGHT = ("ising", "report.spectra", "cli", "cli.solve")
HEAVY = {"torch", "transformers", "datasets", "matplotlib"}


def test_the_combinatorial_half_and_the_command_line_import_without_torch():
    whole = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in (SOURCE / "ising").rglob("*.py")]
    names = [name for name in (*whole, *LIGHT) if not name.endswith("__init__")]
    code = f"import sys\n{chr(10).join(f'import excise.{name}' for name in names)}\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_nothing_in_the_package_imports_matplotlib():
    found = {name for path in SOURCE.rglob("*.py") for name in _modules(path)}
    assert "numpy" in found
    assert not {name for name in found if name.partition(".")[0] in ("matplotlib", "mpl_toolkits")}


def test_a_solve_imports_neither_torch_nor_transformers():
    code = (
        "import sys, numpy as np\nfrom excise.ising.energies import Energy\nfrom excise.ising.problem import Problem\n"
        "from excise.ising.solvers import solve\n"
        "solve(Problem(Energy(None, np.eye(6)), 2), states=3)\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_every_package_imported_is_a_declared_dependency():
    """One that only comes with another package is missing wherever that one has another version."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    extras = {name: given for name, given in project["optional-dependencies"].items() if name != "dev"}
    declared = {_plain(re.match(r"[\w.-]+", line)[0]) for line in sum(extras.values(), project["dependencies"])}
    imported = {name.partition(".")[0] for path in SOURCE.rglob("*.py") for name in _modules(path)}
    installed = packages_distributions()
    wanted = {
        name: {_plain(made) for made in installed.get(name, [name])}
        for name in imported - set(sys.stdlib_module_names) - {"excise", "_typeshed"}
    }
    assert {"torch", "yaml", "pydantic"} <= set(wanted)
    assert {name for name, made in wanted.items() if not made & declared} == set()


# Folders and modules of the package in the order in which data passes through them: each imports only from those above
# it (and within itself).
STAGES = (
    *("errors", "interrupts", "text", "plain", "settings", "progress", "artefacts", "team", "drawing"),
    *("ising", "models", "data", "job", "store", "context", "measuring"),
    *("evaluation", "surgery", "repair", "healing", "choosing", "forecast", "report", "run", "cli", "__main__"),
)


def test_every_stage_imports_only_from_those_above_it():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        importer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for imported in _imports(path):
            if importer != "__init__" and STAGES.index(imported) > STAGES.index(importer):
                wrong.append(f"{path.relative_to(SOURCE)} imports {imported}")
    assert not wrong


def _modules(path):
    """Everything that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "excise":
            yield from (f"excise.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _plain(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imports(path):
    """First parts below excise of what a file imports."""
    names = (name for name in _modules(path) if name.startswith("excise.") and name != "excise.__version__")
    yield from (name.split(".")[1] for name in names)
