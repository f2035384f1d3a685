"""Tables show what they are given."""

import io

from rich.console import Console

from excise.ising.problem import Problem
from excise.ising.solvers import solve_all
from excise.report.spectra import budgets_table, certificate, spectrum_table
from excise.report.tables import candidates_table
from excise.text import human_bytes, ranges


def printed(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_tables_mark_the_chosen_row_and_name_the_proof(energy, spectrum, verified):
    text = printed(candidates_table(verified, verified.best, total=100))
    assert next(line for line in text.splitlines() if "→" in line).split()[3:5] == ["fisher:0", "│"]
    assert "0–2" in text
    assert "∞" in text
    assert "certified" in certificate(spectrum)
    assert printed(spectrum_table(spectrum, energy)).count("│") > 40


def test_small_helpers():
    assert ranges((3, 12, 13, 14, 26, 27)) == "3,12–14,26,27"
    assert ranges(()) == ""
    assert [human_bytes(n) for n in (0, 999, 1000, 14_155_776)] == ["0 B", "999 B", "1.0 kB", "14.2 MB"]


def test_all_budgets_have_a_row(energy):
    spectra = solve_all(Problem(energy, 1), range(1, 8), states=3)
    assert printed(budgets_table(spectra)).count(" yes ") == 7
