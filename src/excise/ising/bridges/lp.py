"""A problem in the CPLEX LP format, every constraint an explicit row; read by Gurobi, SCIP, CPLEX and others."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from excise.artefacts import atomic_path
from excise.ising.bridges.refused import require_no_pattern
from excise.ising.problem import Problem

# Characters; some readers stop at 255.
LINE = 200
# A space where no line may end, so that sign, number and name of a term stay together.
GLUE = "\u00a0"


def write_lp(problem: Problem, path: str | Path) -> None:
    r"""Write `min hᵀx + xᵀJx` over binaries x0 … x{N−1}, with rows for budget, protected, forced and constraints.

    Variable x{i} is unit i of the energy; comments carry the labels. Numbers are written in full precision. Without a
    budget, the row asks for at least one removed unit.

    >>> import tempfile
    >>> from excise.ising.energies import Energy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_lp(Problem(Energy([1.0, 0.0], [[2.0, -1.5], [-1.5, 3.0]]), budget=1), f"{folder}/problem.lp")
    ...     print(open(f"{folder}/problem.lp").read())
    \ E(x) = h'x + x'Jx of 2 units, written by excise; x = 1 removes a unit
    \ x0: 0
    \ x1: 1
    Minimize
     obj: 1.0 x0 + [ 4.0 x0 ^2 + 6.0 x1 ^2 - 6.0 x0 * x1 ] / 2
    Subject To
     budget: x0 + x1 = 1
    Binaries
     x0 x1
    End
    <BLANKLINE>

    """
    require_no_pattern(problem)
    energy = problem.energy
    n = len(energy)
    linear = _sum((value, f"x{i}") for i, value in enumerate(energy.h.tolist()))
    squares = [(2 * value, f"x{i}{GLUE}^2") for i, value in enumerate(np.diag(energy.J).tolist())]
    # The format halves what stands in brackets, and each pair is in xᵀJx twice.
    products = [(4 * float(energy.J[i, j]), f"x{i}{GLUE}*{GLUE}x{j}") for i in range(n) for j in range(i + 1, n)]
    quadratic = _sum([*squares, *products])
    objective = linear or f"0{GLUE}x0"
    if quadratic:
        objective += f" +{GLUE}[{GLUE}{quadratic}{GLUE}]{GLUE}/{GLUE}2"
    every = f" +{GLUE}".join(f"x{i}" for i in range(n))
    size = ">= 1" if problem.budget is None else f"= {problem.budget}"
    rows = [f"budget: {every}{GLUE}{size}"]
    rows += [f"protected_{i}: x{i} = 0" for i in problem.protected]
    rows += [f"forced_{i}: x{i} = 1" for i in problem.forced]
    for k, constraint in enumerate(problem.constraints):
        terms = _sum((weight, f"x{i}") for i, weight in enumerate(constraint.weights))
        rows.append(f"constraint_{k}: {terms or f'0{GLUE}x0'}{GLUE}>={GLUE}{constraint.at_least!r}")
    text = [
        f"\\ E(x) = h'x + x'Jx of {n} units, written by excise; x = 1 removes a unit",
        *(f"\\ x{i}: {' '.join(label.split())}" for i, label in enumerate(energy.labels)),
        *(f"\\ constraint_{k}: {' '.join(c.name.split())}" for k, c in enumerate(problem.constraints)),
        "Minimize",
        _wrapped(f"obj: {objective}"),
        "Subject To",
        *(_wrapped(row) for row in rows),
        "Binaries",
        _wrapped(" ".join(f"x{i}" for i in range(n))),
        "End",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")


def _sum(terms: Iterable[tuple[float, str]]) -> str:
    """`2.0 x0 - 3.0 x1`, without the terms whose coefficient is 0."""
    text = " ".join(
        f"{'-' if value < 0 else '+'}{GLUE}{abs(value)!r}{GLUE}{name}" for value, name in terms if value != 0
    )
    return text.removeprefix(f"+{GLUE}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, LINE, initial_indent=" ", subsequent_indent="  ", break_on_hyphens=False).replace(
        GLUE, " "
    )
