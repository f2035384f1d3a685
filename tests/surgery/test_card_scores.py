"""Scores in a model card: metadata as the hub reads them, a section that is replaced and nothing else touched."""

import pytest
from huggingface_hub import ModelCard

from excise.errors import InputError
from excise.evaluation.scores import Metric, Result, Scores
from excise.ising.spectrum import Spectrum, State
from excise.surgery.card import model_card
from excise.surgery.card_scores import update_card
from tests.report.folders import PRUNED, scores

SPECTRUM = Spectrum((State((1, 4, 5), 0.25), State((2, 3, 4), 0.5)), 12, 3, "exhaustive", 0.1, certified=True)


@pytest.fixture
def folder(tmp_path):
    facts = {"original": "org/model", "removed": [1, 4, 5], "original_blocks": [0, 2, 3, 6, 7, 8, 9, 10, 11]}
    (tmp_path / "README.md").write_text(model_card(facts, name="small") + "\nWritten by hand.\n")
    return tmp_path


def test_the_hub_reads_the_scores(folder):
    assert update_card(folder, scores(), PRUNED.hash)
    card = ModelCard.load(folder / "README.md")
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert found["arc_easy"].metric_type == "acc_norm"
    assert found["arc_easy"].metric_value == pytest.approx(0.51)
    assert found["arc_easy"].dataset_type == "org/arc"
    assert found["wiki.txt"].metric_type == "perplexity"
    assert card.data.to_dict()["model-index"][0]["name"] == folder.name
    assert card.data.base_model == "org/model"


def test_the_original_stands_beside_it(folder):
    update_card(folder, scores(), PRUNED.hash, SPECTRUM)
    text = (folder / "README.md").read_text()
    assert "| arc_easy (acc_norm) | 0.7100 ± 0.0200 | 0.5100 ± 0.0200 | 0-shot, 100 of 200 samples |" in text
    assert "| 0 | 0.25 | 1,4,5 |" in text
    assert "proved (exhaustive)" in text
    assert text.index("## Scores") < text.index("## Spectrum") < text.index("## Use")


def test_a_second_update_replaces_the_first(folder):
    before = (folder / "README.md").read_text()
    update_card(folder, scores(), PRUNED.hash, SPECTRUM)
    once = (folder / "README.md").read_text()
    update_card(folder, scores(), PRUNED.hash, SPECTRUM)
    assert (folder / "README.md").read_text() == once
    assert once.count("## Scores") == 1
    for line in before.split("---\n")[2].splitlines():
        assert line in once


def test_without_card_or_scores_nothing_happens(folder, tmp_path_factory):
    before = (folder / "README.md").read_text()
    assert not update_card(folder, Scores(), PRUNED.hash)
    assert (folder / "README.md").read_text() == before
    assert not update_card(tmp_path_factory.mktemp("empty"), scores(), PRUNED.hash)


HOSTILE = 'it\'s "a: b"\n---\n- c #d | \x1b[2J \ud83d {e}'


def test_the_metadata_are_valid_whatever_the_names(tmp_path):
    """Names of models, texts, data sets and settings come from files, folders and the command line."""
    place = tmp_path / 'it\'s "a: b" #c'
    place.mkdir()
    (place / "README.md").write_text(model_card({"original": "org/model", "removed": [1]}, name="small"))
    kept = scores()
    named = Result(
        PRUNED.hash,
        "benchmark",
        HOSTILE,
        {"shots": 5, HOSTILE: HOSTILE, "nested": {"list": [1, HOSTILE]}},
        {"acc,none": Metric(0.5, 0.01)},
        {"samples": 1, "of_samples": 1, "shots": 5, "dataset": {"path": HOSTILE, "name": HOSTILE, "split": HOSTILE}},
    )
    assert update_card(place, kept.adding(PRUNED, named), PRUNED.hash)
    card = ModelCard.load(place / "README.md", ignore_metadata_errors=False)
    (found,) = [result for result in card.data.eval_results if result.dataset_type == HOSTILE]
    assert (found.metric_value, found.dataset_name) == (0.5, HOSTILE)
    assert found.dataset_args == {"shots": 5, HOSTILE: HOSTILE, "nested": {"list": [1, HOSTILE]}}
    assert card.data.model_name == place.name
    assert (card.data.base_model, card.data.tags) == ("org/model", ["excise", "depth-pruning", "pruned"])
    assert "- c #d" not in card.text.splitlines()


def test_a_broken_card_is_refused(folder):
    (folder / "README.md").write_text("---\n- a list\n---\n# Title\n")
    with pytest.raises(InputError, match="metadata"):
        update_card(folder, scores(), PRUNED.hash)
