"""The panel's table: figures, marks, notes, and what the brief one leaves out."""

import io
import math

import pytest
from rich.console import Console

from excise.evaluation.panel.panel import Panel
from excise.evaluation.panel.rows import Figure, Row
from excise.evaluation.scores import Model
from excise.report.panel import figure_text, panel_table

HALF, LOW = Figure(0.5, 0.3, 0.7), Figure(0.1, 0.0, 0.2)
WORSE, EVEN, NONE = Figure(-0.4, -0.6, -0.2), Figure(0.0, -0.1, 0.1), Figure(math.nan, math.nan, math.nan)


def model(name, removed=()):
    return Model(name, name, removed, 6, "refined" if removed else None, None, False, 1, 1)


def rows():
    return (
        Row("capabilities", "JSON", "", "share", True, 8, (HALF, LOW), (WORSE,)),
        Row("capabilities", "copying", "", "share", True, 8, (LOW, HALF), (Figure(0.4, 0.2, 0.6),), 0.0, "not able"),
        Row("capabilities", "copying", "6 words", "share", True, 4, (LOW, LOW), (EVEN,)),
        Row("health", "longest loop", "", "tokens", False, 9, (LOW, HALF), (Figure(0.4, 0.2, 0.6),)),
        Row("agreement", "KL", "", "nats", False, 9, (None, HALF)),
        Row("agreement", "KL", "code", "nats", False, 5, (None, LOW)),
    )


def shown(brief):
    panel = Panel((model("small"), model("cut", (2,))), rows(), (), {}, 0.9, {})
    text = io.StringIO()
    Console(file=text, width=120).print(panel_table(panel, brief=brief))
    return [[cell.strip() for cell in line.split("│")] for line in text.getvalue().splitlines() if "│" in line]


def test_rows_have_figures_marks_and_notes():
    lines = shown(brief=False)
    assert lines[0][1:] == ["JSON", "8", "50 % [30, 70]", "10 % [0, 20] ▼", "", ""]
    assert lines[1][1:] == ["copying", "8", "10 % [0, 20]", "50 % [30, 70] ▲", "not able", ""]
    assert lines[3][4] == "0.5 [0.3, 0.7] ▼"
    assert lines[4][1:] == ["KL", "9", "", "0.50 [0.30, 0.70]", "", ""]
    assert [line[1] for line in lines] == ["JSON", "copying", "6 words", "longest loop", "KL", "code"]


def test_the_brief_table_leaves_out_parts():
    assert [line[1] for line in shown(brief=True)] == ["JSON", "copying", "longest loop", "KL"]


@pytest.mark.parametrize(
    ("difference", "higher", "verdict"),
    [(WORSE, True, "worse"), (WORSE, False, "better"), (EVEN, True, ""), (WORSE, None, ""), (NONE, True, "")],
)
def test_only_what_excludes_0_is_marked(difference, higher, verdict):
    assert Row("health", "x", "", "share", higher, 8, (HALF, LOW), (difference,)).verdict(0) == verdict


def test_units():
    assert figure_text(None, "share") == ""
    assert figure_text(HALF, "ratio") == "0.50 [0.30, 0.70]"
