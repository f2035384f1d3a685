"""Published numbers beside those of runs: matched by model, budget, and blocks or method."""

import csv
import io
import json

import pytest

from excise.errors import InputError
from excise.evaluation.scores import Metric, Model, Result, Scores
from excise.report.beside import beside_rows, beside_table, published
from excise.report.material import gather
from excise.report.paper_tables import Cell, Row, benchmark_rows, removal_rows
from tests.report.folders import run_folder

LLAMA, NEMOTRON = "meta-llama/Llama-3.1-8B-Instruct", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8"
DETAILS = {"samples": 100, "of_samples": 100, "shots": 5}
STATE_17 = "2, 16, 18–31"


def test_what_was_published_is_whole():
    rows = published()
    assert len({(row.model, row.removed, row.method) for row in rows}) == len(rows) == 25
    for row in rows:
        assert len(row.scores) == (0 if "Nemotron" in row.model else 6)
        if row.states is not None:
            assert len(json.loads(row.blocks)) == row.removed
    found = {(row.model, row.removed, row.method): row for row in rows}
    state = found["Llama-3.1-8B-Instruct", 16, "CBO: 17"]
    assert (list(state.scores.values()), state.states) == ([0.55, 0.43, 0.66, 0.35, 0.41, 0.21], STATE_17)
    assert found["Qwen3-14B", 12, "BI (Men et al., 2025)"].scores["mmlu"] == 0.62


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run named as the paper's model, its checkpoint healed and judged."""
    folder = tmp_path_factory.mktemp("beside") / "run"
    facts = run_folder(folder, blocks=10, budget=8, name=LLAMA)
    removed = tuple(facts["removed"])
    original = Model("a" * 64, LLAMA, (), 10, None, None, False, 100, 400)
    healed = Model("b" * 64, "run/healed", removed, 10, "fisher:0", LLAMA, True, 60, 240)
    scores = Scores()
    for model, value in ((original, 0.679), (healed, 0.631)):
        result = Result(model.hash, "benchmark", "mmlu", {}, {"acc,none": Metric(value, 0.004)}, DETAILS)
        scores = scores.adding(model, result)
    scores.save(folder / "scores.json")
    return [gather(folder)]


def test_a_run_named_as_the_papers_model_stands_beside_it(run):
    pairs = beside_rows(published(), benchmark_rows(run), removal_rows(run))
    rows = list(csv.reader(io.StringIO(beside_table(pairs, "csv"))))
    assert rows[0][:6] == ["# br", "model", "paper", "here", "mmlu: paper", "here"]
    shown = {(row[2], row[3]): row for row in rows[1:]}
    assert shown["Llama-3.1-8B-Instruct", LLAMA][4:6] == ["0.68", "0.679 ± 0.004"]
    assert shown["CBO: 0", "fisher:0 + healing"][4:6] == ["0.64", "0.631 ± 0.004"]
    assert shown["Norm ratio (Mistral.AI, 2026)", "norm-ratio"][4:6] == ["0.45", ""]
    # What nobody ran here is shown as published, of this budget only.
    assert shown["SWM (Ding et al., 2025)", ""][-2:] == ["[[6,7],[12,13],[24-30]]", ""]
    assert {row[0] for row in rows[1:]} == {"0", "8"}


def test_scores_and_blocks_may_be_shown_alone(run):
    pairs = beside_rows(published(), benchmark_rows(run), removal_rows(run))
    assert "blocks" not in beside_table(pairs, "markdown", "1")
    head = beside_table(pairs, "markdown", "2").splitlines()[0]
    assert head == "| # br | model | paper | here | blocks: paper | here |"


def test_the_same_blocks_are_the_same_row_whatever_found_them():
    scores = [Row(LLAMA, 16, name, {"mmlu": Cell(0.5, 0.1)}) for name in ("refined:0 + healing", "fisher:0, sleb")]
    removals = [(16, LLAMA, "refined:0", STATE_17), (16, LLAMA, "sleb", "0–15")]
    pairs = {pair.here.method: pair for pair in beside_rows(published(), scores, removals) if pair.here}
    assert pairs["refined:0 + healing"].paper.method == "CBO: 17"
    assert pairs["fisher:0, sleb"].paper.method == "CBO: 0"
    assert pairs["fisher:0, sleb"].to_json()["here"]["blocks"] == "0–15"


def test_what_is_published_as_bars_has_blocks_only():
    pairs = beside_rows(published(), [Row(NEMOTRON, 2, "fisher:1")], [])
    assert [pair.paper.method for pair in pairs if pair.here] == ["CBO: 1"]
    assert beside_table(pairs, "csv").splitlines()[0] == "# br,model,paper,here,blocks: paper,here"


def test_a_model_that_is_not_published_is_told():
    with pytest.raises(InputError, match=r"Qwen3-14B without 12.*got org/model without 3"):
        beside_rows(published(), [Row("org/model", 3, "fisher:0")], [])
