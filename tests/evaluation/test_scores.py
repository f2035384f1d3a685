"""Scores as an artefact: keyed by what determines them, read back as written."""

import json

import pytest

from excise.errors import InputError
from excise.evaluation.scores import Metric, Model, Result, Scores, describe
from excise.models.identity import model_identity
from tests.tiny import tiny_model

ORIGINAL = Model("aaa", "org/model", (), 30, None, None, False, 100, 400)
PRUNED = Model("bbb", "run/model", (3, 4), 30, "fisher:0", "org/model", False, 90, 360)


def result(model="aaa", name="task", value=0.5, **settings):
    return Result(
        model,
        "benchmark",
        name,
        settings,
        {"acc,none": Metric(value, 0.1)},
        {"samples": 10, "of_samples": 10, "shots": None},
    )


def test_a_result_of_the_same_settings_is_replaced_and_one_of_others_is_added():
    scores = Scores().adding(ORIGINAL, result(limit=10)).adding(ORIGINAL, result(limit=None, value=0.6))
    assert len(scores.results) == 2
    again = scores.adding(ORIGINAL, result(limit=10, value=0.7))
    assert [r.score.value for r in again.results] == [0.6, 0.7]
    assert again.find("aaa", "benchmark", "task", {"limit": 10}).score.value == 0.7
    assert again.find("bbb", "benchmark", "task", {"limit": 10}) is None
    assert again.latest("aaa", "benchmark")["task"].score.value == 0.7


def test_scores_are_read_back_as_they_were_written(tmp_path):
    scores = Scores().adding(ORIGINAL, result(limit=10)).adding(PRUNED, result("bbb"))
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "excise scores 1", "models": {"a": {}}, "results": []}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(InputError, match="scores"):
        Scores.load(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("names", "headline"),
    [
        (["acc,none", "acc_norm,none"], "acc_norm,none"),
        (["exact_match,flexible-extract", "exact_match,strict-match"], "exact_match,strict-match"),
        (["loss", "perplexity"], "perplexity"),
        (["something,none"], "something,none"),
    ],
)
def test_one_metric_stands_for_a_result(names, headline):
    assert Result("a", "benchmark", "t", {}, {name: Metric(0.1) for name in names}).headline == headline


def test_a_pruned_checkpoint_is_described_by_its_recipe(tmp_path):
    model = tiny_model("llama", layers=4)
    (tmp_path / "excise.json").write_text(
        json.dumps({"removed": [1, 5], "original": "org/model", "proposed_by": "norm-ratio"})
    )
    described = describe(str(tmp_path), model, model_identity(model))
    assert described.removed == (1, 5)
    assert described.blocks == 6
    assert described.label == "norm-ratio"
    assert described.original == "org/model"
    assert described.bytes == 4 * described.parameters + sum(b.numel() * b.element_size() for b in model.buffers())
    assert describe("org/model", model, "x").label == "org/model"
