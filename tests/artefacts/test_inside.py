"""Names that artefacts give, and what links may lead to."""

from __future__ import annotations

import json

import pytest

from excise.artefacts import inside
from excise.errors import InputError
from excise.evaluation.evaluate import checkpoints, chosen_from

RUN = {"model": "org/name", "checkpoint": "model", "energy": "fisher", "spectra": {"fisher": "spectrum-fisher.json"}}


@pytest.mark.parametrize("name", ["model", "healed/model", "a b", "…", "model/", "..a"])
def test_plain_names_are_taken(name, tmp_path):
    assert inside(tmp_path, name, "run.json") == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../other", "a/../../b", "/etc/passwd", "a\\..\\b", "a\0b", None, 3, ["model"]]
)
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"run\.json names .*; expected a name inside"):
        inside(tmp_path, name, "run.json")


@pytest.mark.parametrize("target", ["../other", "model", "../folder/real"])
def test_links_may_lead_within_the_folder(target, tmp_path):
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (folder / "model").symlink_to(target)
    if target.endswith("real"):
        assert inside(folder, "model", "run.json") == folder / "model"
    else:
        with pytest.raises(InputError, match="a link that leads out of"):
            inside(folder, "model", "run.json")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"checkpoint": "../other"}, "names '../other'"),
        ({"checkpoint": None}, "checkpoint: input should be a valid string"),
        ({"model": ["x"]}, "model: input should be a valid string"),
        ({"spectra": []}, "spectra: input should be a valid dictionary"),
        ({"spectra": {"fisher": "../secret.json"}}, "names '../secret.json'"),
    ],
)
def test_evaluate_believes_no_name_in_run_json(change, error, tmp_path):
    place = tmp_path / "run"
    (place / "model").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (place / "run.json").write_text(json.dumps(RUN | change))
    with pytest.raises(InputError, match=error):
        (checkpoints([str(place)], True), chosen_from(str(place / "model")))


@pytest.mark.parametrize("content", ["[]", "3", "{}"])
def test_evaluate_says_what_is_no_run(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        checkpoints([str(tmp_path)], True)


def test_a_report_rewrites_no_card_elsewhere(excise, tmp_path):
    """`"checkpoint": "../other"`, or a link of that name, made `excise report` rewrite another model's card."""
    other, place = tmp_path / "other", tmp_path / "run"
    other.mkdir()
    place.mkdir()
    (other / "README.md").write_text("---\ntags: []\n---\nmine\n")
    facts = {"base_loss": 1.0, "candidates": [], "blocks": 4, "budget": 1, "removed": [1], "model_hash": "x"}
    for name in ("../other", str(other), "link"):
        if name == "link":
            (place / "link").symlink_to(other)
        (place / "run.json").write_text(json.dumps({**RUN, **facts, "checkpoint": name}))
        code, _, err = excise("report", place)
        assert (code, "run.json names" in err) == (2, True)
        assert (other / "README.md").read_text().endswith("mine\n")
