"""Figures are drawn from what they are given, and tables show it."""

import io

import numpy as np
import pytest
from rich.console import Console

from excise.choosing.verify import Candidate, Verified
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import solve, solve_all
from excise.report.figures import couplings, energy_and_loss, removal_frequency, write_figures
from excise.report.spectra import budget_curve, budgets_table, certificate, spectrum_table
from excise.report.tables import candidates_table
from excise.text import human_bytes, ranges


@pytest.fixture
def energy():
    factor = np.random.default_rng(0).normal(size=(40, 8))
    return Energy(None, factor.T @ factor / 40, source={"kind": "fisher"})


@pytest.fixture
def spectrum(energy):
    return solve(Problem(energy, 3), states=20)


@pytest.fixture
def verified(energy):
    removals = [("fisher:0", (0, 1, 2)), ("norm-ratio", (1, 2, 3)), ("random:0", (2, 5, 7)), ("random:1", (0, 4, 6))]
    candidates = [
        Candidate(method, removed, energy.energy(removed), 3.0 + i, 1.0 + i, float(np.exp(3 + i)), 70)
        for i, (method, removed) in enumerate(removals)
    ]
    broken = Candidate("fisher:1", (5, 6, 7), 0.1, float("inf"), float("inf"), float("inf"), 70)
    return Verified(2.0, (*candidates, broken), 0.5, 100.0)


def test_every_figure_is_written(tmp_path, energy, spectrum, verified):
    names = write_figures(tmp_path / "figures", energy, spectrum, verified, verified.best)
    assert set(names) == {"couplings", "removal_frequency", "energy_and_loss"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names.values())


def test_the_bars_are_the_counts_among_the_lowest_states(spectrum, verified):
    axes = removal_frequency(spectrum, verified.best).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([sum(block in s.removed for s in spectrum) for block in range(8)])


def test_the_maps_show_magnitude_and_correlation(energy):
    left, right = couplings(energy).axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), np.log10(np.abs(energy.J)))
    np.testing.assert_allclose(right.images[0].get_array(), energy.correlation())


def test_points_that_are_not_finite_are_left_out(energy, verified):
    axes = energy_and_loss(energy, verified, verified.best).axes[0]
    shown = sum(len(collection.get_offsets()) for collection in axes.collections)
    assert shown == 4 + 1  # four finite candidates and the ring around the chosen one
    assert "0.50" in axes.get_title()


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


def test_all_budgets_have_a_row_and_a_point(energy):
    spectra = solve_all(Problem(energy, 1), range(1, 8), states=3)
    assert printed(budgets_table(spectra)).count(" yes ") == 7
    points = budget_curve(spectra).axes[0].lines[0]
    assert points.get_ydata() == pytest.approx([spectrum[0].energy for spectrum in spectra.values()])
