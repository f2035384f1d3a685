"""The paper's tables: rows from every artefact, the best marked only beyond the error, three formats."""

import csv
import io

import pytest

from excise.errors import InputError
from excise.report.material import gather
from excise.report.paper_tables import (
    Cell,
    Row,
    benchmark_rows,
    benchmark_table,
    best_of,
    removal_rows,
    removal_table,
)
from tests.report.folders import full_folder, run_folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("tables") / "run"
    full_folder(place)
    return [gather(place)]


def row(rows, removed, method):
    return next(r for r in rows if (r.removed, r.method) == (removed, method))


def test_rows_hold_scores_perplexity_and_damage_of_each_method(found):
    rows = benchmark_rows(found)
    assert rows[0].removed == 0
    assert rows[0].method == rows[0].model == "org/model"
    ours = row(rows, 3, "norm-ratio")
    assert ours.cells["arc_easy"] == Cell(0.51, 0.02)
    assert ours.cells["ppl wiki.txt"].value == pytest.approx(20)
    assert ours.cells["Δ loss"].value == pytest.approx(0.36)
    assert row(rows, 3, "norm-ratio + healing").cells["arc_easy"].value == pytest.approx(0.63)
    assert [r.removed for r in rows] == sorted(r.removed for r in rows)


def test_another_metric_may_be_shown(found):
    assert row(benchmark_rows(found, {"arc_easy": "acc"}), 3, "norm-ratio").cells["arc_easy"].value == 0.5
    with pytest.raises(InputError, match="no metric 'f1'"):
        benchmark_rows(found, {"arc_easy": "f1"})


@pytest.mark.parametrize(
    ("cells", "best"),
    [
        ({"a": Cell(0.9, 0.01), "b": Cell(0.8, 0.01)}, "a"),
        ({"a": Cell(0.9, 0.04), "b": Cell(0.8, 0.04)}, None),  # 0.1 < 1.96 √2 · 0.04 = 0.111
        ({"a": Cell(0.9, 0.01), "b": Cell(0.89, 0.01), "c": Cell(0.1, 0.01)}, None),
        ({"a": Cell(0.9, 0.01)}, None),
        ({"a": Cell(0.9), "b": Cell(0.1)}, None),
        ({"a": Cell(9.0, 0.1, False), "b": Cell(12.0, 0.1, False)}, "a"),
        ({"a": Cell(1.0, None, False, behind=(0, 0)), "b": Cell(1.5, None, False, behind=(0.1, 0.9))}, "a"),
        ({"a": Cell(1.0, None, False, behind=(0, 0)), "b": Cell(1.5, None, False, behind=(-0.1, 0.9))}, None),
    ],
)
def test_the_best_is_marked_only_beyond_the_error(cells, best):
    assert best_of(cells) == best


def test_markdown_marks_the_winner_and_no_tie(found):
    text = benchmark_table(benchmark_rows(found), "markdown")
    lines = text.splitlines()
    assert lines[0] == "| # br | model | method | arc_easy | winogrande | ppl wiki.txt | Δ loss |"
    healed = next(line for line in lines if "norm-ratio + healing" in line)
    assert "**0.630 ± 0.020**" in healed
    assert "**" not in healed.split("|")[5]  # Winogrande, whose errors overlap
    original = next(line for line in lines if line.startswith("| 0 |"))
    assert "**" not in original
    # sleb leads norm-ratio by less than the paired interval.
    assert not any("**" in line.split("|")[7] for line in lines[2:])


def test_latex_escapes_what_it_must(found):
    text = benchmark_table(benchmark_rows(found), "latex")
    assert text.startswith("\\begin{tabular}{rllllll}\n\\toprule\n\\# br & model & method & arc\\_easy")
    assert "\\textbf{0.630 $\\pm$ 0.020}" in text
    assert all(line.count(" & ") == 6 for line in text.splitlines() if line.endswith("\\\\"))


def test_csv_holds_plain_numbers(found):
    rows = list(csv.DictReader(io.StringIO(benchmark_table(benchmark_rows(found), "csv"))))
    healed = next(r for r in rows if r["method"] == "norm-ratio + healing")
    assert float(healed["arc_easy"]) == pytest.approx(0.63)
    assert float(healed["arc_easy stderr"]) == 0.02
    assert healed["arc_easy best"] == "1"
    assert healed["winogrande best"] == "0"


def test_table_2_lists_blocks_and_puts_merged_runs_in_brackets(found):
    rows = removal_rows(found)
    assert (3, "org/model", "swm-code", "[0–3]") in rows
    assert (3, "org/model", "sleb", "1–3") in rows
    assert not any(method.startswith("random") for _, _, method, _ in rows)
    assert any(method.startswith("random") for _, _, method, _ in removal_rows(found, random=True))
    assert removal_table(rows, "markdown").startswith("| # br | model | method | blocks removed |\n| --- |")
    assert "[0--3]" in removal_table(rows, "latex")
    assert len(list(csv.reader(io.StringIO(removal_table(rows, "csv"))))) == len(rows) + 1


def test_runs_alone_give_damage_without_marks(tmp_path):
    facts = run_folder(tmp_path)
    rows = benchmark_rows([gather(tmp_path)])
    assert {r.method for r in rows} == {c["method"] for c in facts["candidates"]}
    assert "**" not in benchmark_table(rows, "markdown")


def test_mistakes_are_told(found):
    for table, rows in ((benchmark_table, benchmark_rows(found)), (removal_table, removal_rows(found))):
        with pytest.raises(InputError, match="--format"):
            table(rows, "html")


HOSTILE = '=HYPERLINK("x")|\n# <b>\\input{x}'


@pytest.mark.parametrize(
    ("style", "model", "lines"),
    [
        ("markdown", '| \\=HYPERLINK("x")\\| # \\<b\\>\\\\input{x} |', 4),
        ("latex", r'=HYPERLINK("x")| \# <b>\textbackslash{}input\{x\}', 8),
        ("csv", '"\'=HYPERLINK(""x"")| # <b>\\input{x}"', 3),
    ],
)
def test_names_of_others_are_text_in_every_format(style, model, lines):
    rows = [Row(HOSTILE, 0, HOSTILE, {"-cmd|x": Cell(-0.5)}), Row("plain", 1, "+1", {"-cmd|x": Cell(0.25)})]
    text = benchmark_table(rows, style)
    assert model in text
    assert len(text.splitlines()) == lines
    removals = removal_table([(2, HOSTILE, "@method", "0, [3, 4]")], style)
    assert model in removals
    assert "[3, 4]" in removals
    if style == "csv":
        assert next(csv.reader(io.StringIO(text)))[3] == "'-cmd|x"
        assert list(csv.reader(io.StringIO(text)))[1][3] == "-0.5"
