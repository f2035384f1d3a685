"""Figure files: the page's own charts, each holding the values it is of."""

import itertools
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from markupsafe import Markup

from excise.artefacts import read_json, write_json
from excise.drawing.axes import WIDE, number
from excise.drawing.chart import svg_file
from excise.drawing.heat_map import LEVELS, STOPS
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import solve_all
from excise.report.figures import write_report_figures, write_run_report
from excise.report.material import Measured, gather, measured_removals
from excise.report.page import render
from excise.report.sections import SECTIONS
from excise.report.sections.budgets import MEASURED, PREDICTED, WRITTEN, Point
from excise.report.sections.budgets import budget_chart as damage_of_budgets
from excise.report.sections.couplings import couplings_chart
from excise.report.sections.damage import _damage_axis, against_budget, against_cost, at_budget
from excise.report.sections.prediction import damage_chart
from excise.report.sections.refinement import budget_figures
from excise.report.sections.removal import LOWEST, frequency_chart
from excise.report.spectra import budget_chart
from tests.drawing.test_heat_map import read_back
from tests.report.folders import HOSTILE, add_comparison, add_spectra, full_folder, run_folder
from tests.svg_files import Figure

ALL = {
    *(
        "benchmarks",
        "capabilities",
        "couplings",
        "damage-2",
        "damage-3",
        "damage_against_budget",
        "damage_against_cost",
    ),
    *("capabilities", "damage_of_budgets", "energy_and_loss-3", "healing", "predictions-3", "removal_frequency-3"),
}


def read(chart):
    return Figure(svg_file(chart))


def test_points_that_are_not_finite_are_left_out(verified):
    measured = measured_removals([asdict(candidate) for candidate in verified.candidates])[3]
    figure = read(damage_chart(measured, verified.best.removed, "fisher", 3))
    expected = {
        f"{c.method}: energy {number(c.energy)}, Δ loss {number(c.delta)}" for c in verified.candidates if c.loss < 99
    }
    assert len(expected) == 4
    assert set(figure.tips) == expected
    # The ring lies around what was removed.
    (ring,) = figure.marked("ring")
    chosen = next(mark for mark in figure.marked("mark") if mark.get("data-removed") == "0,1,2")
    assert chosen.get("d").startswith(f"M{float(ring.get('cx')) - 5:.1f} {ring.get('cy')}")


def test_bars_are_the_shares_among_the_lowest_states(spectrum, energy):
    figure = read(frequency_chart(spectrum, 8, (0, 1, 2), "fisher"))
    heights = [float(bar.get("height")) for bar in figure.marked("bar")]
    assert heights == pytest.approx([sum(block in s.removed for s in spectrum) / LOWEST for block in range(8)])
    shown = [mark.get("data-block") for mark in figure.marked("removed-mark") if mark.get("display") != "none"]
    assert shown == ["0", "1", "2"]
    assert f"block 0: in {round(20 * heights[0])} of 20 states" in figure.tips
    assert "Among the 20 lowest states of fisher at M = 3" in figure.texts[-1]
    assert "proved" in figure.texts[-1]


def test_the_maps_show_couplings_with_their_signs_and_correlations(energy):
    values, values_scale, correlation, correlation_scale = read(couplings_chart(energy, "fisher")).maps()
    assert (energy.J < 0).any()
    unit = np.median(np.abs(energy.J))
    most = np.arcsinh(np.abs(energy.J).max() / unit)
    shown = read_back(values, most, (8, 8))
    np.testing.assert_allclose(shown, np.arcsinh(energy.J / unit), atol=most / (LEVELS - 1) + 1e-9)
    shown = read_back(correlation, 1.0, (8, 8))
    np.testing.assert_allclose(shown, energy.correlation(), atol=1 / (LEVELS - 1) + 1e-9)
    assert len(values_scale) == len(correlation_scale) == LEVELS


def test_an_energy_without_couplings_has_a_map(energy):
    chart = couplings_chart(Energy(np.ones(4), np.zeros((4, 4))), "none")
    values, _, correlation, _ = read(chart).maps()
    assert [*values] == [STOPS[4]]
    assert len(correlation) == 2


def test_all_budgets_have_a_point_and_the_open_ones_a_bound(energy):
    spectra = solve_all(Problem(energy, 1), range(1, 8), states=3)
    figure = read(budget_chart(spectra))
    assert figure.tips == [f"ground state, M = {m}: {number(s[0].energy)}" for m, s in spectra.items()]
    assert figure.texts[-1] == "7 of 7 certified."
    spectra[4] = replace(spectra[4], certified=False, lower_bound=spectra[4][0].energy - 0.5, gap=0.1)
    figure = read(budget_chart(spectra))
    assert f"proved lower bound, M = 4: {number(spectra[4][0].energy - 0.5)}" in figure.tips
    assert figure.texts[-1] == "6 of 7 certified."


METHODS = (("sleb", 0.1), ("norm-ratio", 1.0), ("first", 2.0), ("broken", math.inf))


def rows(costs):
    """Three methods and one whose damage is infinite, at three budgets."""
    return [
        {
            "method": method,
            "remove": budget,
            "removed": list(range(budget)),
            "delta": delta * budget,
            "interval": [delta * budget - 0.1, delta * budget + 0.1],
            "forward_tokens": cost,
            "backward_tokens": cost,
        }
        for budget in (2, 4, 6)
        for (method, delta), cost in zip(METHODS, costs, strict=True)
    ]


def test_damage_against_the_budget_has_a_line_a_whisker_and_a_point_each():
    figure = read(against_budget(rows((1000, 900, 0, 10))))
    assert [element.text for element in figure.marked("name")] == ["sleb", "norm-ratio", "first"]
    assert len(figure.marked("curve")) == 3
    assert len(figure.marked("error")) == 9
    assert "sleb, M = 4: Δ loss 0.4 [0.3, 0.5]" in figure.tips
    assert against_budget([row for row in rows((1, 1, 1, 1)) if row["remove"] == 2]) is None
    assert against_budget([]) is None


def test_of_many_methods_each_has_its_own_mark_and_the_worst_stand_back():
    many = [{"method": f"m{k}", "remove": m, "removed": [], "delta": k + m / 9} for k in range(20) for m in (1, 2)]
    figure = read(against_budget(many))
    assert [len(figure.marked(style)) for style in ("curve", "faint")] == [8, 12]
    assert [element.text for element in figure.marked("name")] == [f"m{k}" for k in range(20)]
    legend = figure.marked("mark")[:20]
    outlines = {(m.get("class"), re.sub(r"^M[\d.]+ [\d.]+", "", m.get("d"))) for m in legend}
    assert len(outlines) == 20


@pytest.mark.parametrize(("first", "zeros"), [(0, 3), (40, 0)])
def test_damage_against_cost_has_a_panel_per_budget_and_a_place_for_what_is_free(first, zeros):
    figure = read(against_cost(rows((100_000, 50, first, 10))))
    assert sum(words.startswith("cost at M = ") for words in figure.texts) == 3
    assert len(figure.tips) == 9
    assert "sleb, M = 4: Δ loss 0.4 [0.3, 0.5], 200,000 tokens" in figure.tips
    assert f"first, M = 2: Δ loss 4 [3.9, 4.1], {number(2 * first)} tokens" in figure.tips
    assert figure.texts.count("0") == zeros
    # What is free lies between the vertical axis and the scale of costs.
    if zeros:
        labels = [element for element in figure.marked("tick") if element.text == "0"]
        axis, first_tick = sorted({float(element.get("x1")) for element in figure.marked("axis")})[:2]
        assert axis < float(labels[0].get("x")) < first_tick
    assert against_cost([{"method": "a", "remove": 2, "delta": 1.0}]) is None


def test_costs_of_one_size_share_a_linear_scale_from_zero():
    figure = read(against_cost(rows((1000, 900, 0, 10))))
    assert figure.texts.count("0") == 3
    assert figure.texts.count("2,000") == 3


def test_damage_at_a_budget_is_listed_least_first():
    figure = read(at_budget(rows((1, 1, 1, 1)), 4))
    names = [element.text for element in figure.marked("name") if element.get("text-anchor") == "end"]
    assert names == ["sleb", "norm-ratio", "first"]
    assert at_budget(rows((1, 1, 1, 1)), 5) is None


def test_damages_of_different_size_share_a_logarithmic_axis():
    found = [{"delta": 0.1, "interval": [-0.1, 0.2]}, {"delta": 9.0, "interval": [8.0, 10.0]}]
    scale = _damage_axis(found, 0, 100)
    assert scale.logarithmic
    assert scale(-0.1) == 0
    assert not _damage_axis([{"delta": -0.1}, {"delta": 9.0}], 0, 100).logarithmic


def test_a_refinement_without_predictions_has_no_figure():
    facts = {"rounds": [], "anchors": [], "low_rho": None, "random_rho": None}
    assert budget_figures({3: facts}) == {}
    facts["anchors"] = [(1.0, 2.0), (0.5, math.inf)]
    figure = read(budget_figures({3: facts})["predictions-3"])
    assert figure.tips == ["random: predicted 1, measured 2"]


def test_what_lies_crowded_is_drawn_again_on_scales_of_its_own(tmp_path):
    """The best lie within 0.02 nats of one another where the worst is 3 nats away."""
    deltas = [0.05, 0.06, 0.07, 0.4, 3.0]
    found = [Measured((k,), (f"fisher:{k}",), 0.1 + d, d, 9.0) for k, d in enumerate(deltas)]
    figure = read(damage_chart(found, (0,), "fisher", 1))
    whole, best = figure.marked("mark")[1:6], figure.marked("mark")[6:]
    assert [mark.get("data-removed") for mark in best] == ["0", "1", "2"]
    assert len(figure.marked("ring")) == 2
    places = [[float(re.match(r"M[\d.]+ ([\d.]+)", mark.get("d"))[1]) for mark in marks] for marks in (whole, best)]
    assert places[0][0] - places[0][1] < 5
    assert min(a - b for a, b in itertools.pairwise(places[1])) > 50
    assert "Beside it the 3 of least damage" in " ".join(figure.texts)
    assert len(read(damage_chart(found[2:], None, "fisher", 1)).marked("mark")) == 1 + 3


def test_two_points_are_the_least_for_damage_against_energy(tmp_path):
    run_folder(tmp_path)
    measured = gather(tmp_path).measured[3]
    assert damage_chart(measured[:1], None, "fisher", 3) is None
    assert "ring" not in damage_chart(measured[:2], None, "fisher", 3).caption


def test_every_chart_of_the_page_is_a_file_and_the_same_drawing(tmp_path):
    full_folder(tmp_path)
    material = gather(tmp_path)
    page = render(material)
    written = write_report_figures(material)
    assert {*written} == ALL
    charts = {name: chart for section in SECTIONS for name, chart in section.figures(material).items()}
    for name, place in written.items():
        figure, chart = Figure(tmp_path / place), charts[name]
        assert figure.title == chart.label
        for words in (*(entry.name for entry in chart.entries), *chart.caption.split()):
            assert words in " ".join(figure.texts)
        # The page has both maps of the couplings one above the other, and a legend of its own around the charts.
        on_page = f'aria-label="{chart.label}" class="chart">{Markup("").join(chart.draw(WIDE).parts)}</svg>'
        assert on_page in page or name == "couplings"
    maps = Figure(tmp_path / written["couplings"]).maps()
    assert all(Markup(f'<path fill="{fill}"') in page for cells in maps for fill in cells)


def test_equal_folders_give_equal_bytes(tmp_path):
    written = []
    for name in ("a", "b"):
        full_folder(tmp_path / name)
        places = write_report_figures(gather(tmp_path / name)).values()
        written.append({place: (tmp_path / name / place).read_bytes() for place in places})
    assert written[0] == written[1]


def test_hostile_names_stay_text_in_files(tmp_path):
    full_folder(tmp_path, name=HOSTILE)
    for name in ("run.json", "compare.json", "scores.json"):
        path = tmp_path / name
        write_json(path, json.loads(json.dumps(read_json(path)).replace("norm-ratio", json.dumps(HOSTILE)[1:-1])))
    figures = {name: Figure(tmp_path / place) for name, place in write_report_figures(gather(tmp_path)).items()}
    for name in ("damage-3", "damage_against_budget", "benchmarks"):
        assert any(HOSTILE in words for words in figures[name].texts)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: add_spectra(folder, range(2, 4)), {"removal_frequency-2"}),
        (lambda folder: add_comparison(folder, (2,)), {"damage-2", "damage_against_cost"}),
        (run_folder, {"couplings", "energy_and_loss-3", "removal_frequency-3"}),
    ],
    ids=["spectra", "comparison", "run"],
)
def test_a_folder_gives_what_it_has_data_for(tmp_path, make, expected):
    make(tmp_path)
    assert {*write_report_figures(gather(tmp_path))} == expected


def test_runs_of_several_budgets_have_a_figure_each(tmp_path):
    for budget in (2, 3):
        run_folder(tmp_path / str(budget), budget=budget)
    names = {*write_report_figures(gather(tmp_path))}
    assert {"damage_against_budget", "damage_of_budgets", "energy_and_loss-2", "energy_and_loss-3"} <= names


def test_damage_against_the_budget_is_predicted_and_measured(tmp_path):
    facts = full_folder(tmp_path)
    material = gather(tmp_path)
    figure = Figure(tmp_path / write_report_figures(material)["damage_of_budgets"])
    written = facts["checkpoint_loss"] - facts["base_loss"]
    assert figure.tips == [
        f"{PREDICTED.name}, M = 3: {number(material.spectra['fitted'][3][0].energy)}",
        f"{MEASURED.name}, M = 1: 0.1",
        f"{MEASURED.name}, M = 3: 0.5",
        f"{WRITTEN.name}, M = 3: {number(written)} ± {number(1.96 * 0.02)}",
    ]
    assert len(figure.marked("whisker")) == 1
    assert "fitted to removals of M = 1, 3" in " ".join(figure.texts)
    assert damage_of_budgets({WRITTEN: [Point(3, 0.5)], MEASURED: [Point(3, 0.4)]}) is None


def test_a_run_has_its_page_before_its_manifest_and_nothing_of_other_runs(tmp_path):
    facts = full_folder(tmp_path)
    (tmp_path / "run.json").unlink()
    run_folder(tmp_path / "other", budget=2)
    figures = write_run_report(tmp_path, facts)
    assert "3 of 12 blocks removed" in (tmp_path / "report.html").read_text()
    assert {"energy_and_loss-3", "healing"} <= figures.keys()
    assert "energy_and_loss-2" not in figures
    assert all((tmp_path / place).is_file() for place in figures.values())


def test_a_folder_that_no_page_can_show_loses_no_run(tmp_path):
    facts = run_folder(tmp_path)
    (tmp_path / "compare.json").write_text(json.dumps({"rows": "none"}))
    with pytest.warns(UserWarning, match="the report was not written: .*compare.json"):
        assert write_run_report(tmp_path, facts) == {}
