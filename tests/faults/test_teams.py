"""Several processes; `make test-faults` kills more of them, in every stage of every verb."""

from __future__ import annotations

import pytest

from excise.team import Team, launched
from tests.faults.test_faults import figures


@pytest.mark.parametrize(
    ("verb", "kills"),
    [
        ("score", 1),
        pytest.param("run", 1, marks=pytest.mark.slow),
        pytest.param("prune --repair", 0, marks=pytest.mark.slow),
    ],
)
def test_several_processes_write_what_one_writes(verb, kills, tmp_path):
    stage = "gradients"
    found = figures("teams", "--n", kills, "--verb", verb, "--stage", stage, cache=tmp_path)["verbs"][verb]
    assert found["sizes"] == [2, 3]
    assert found["wrong"] == []
    assert sum(found["kills"].values()) == kills


def test_a_verb_that_does_not_divide_refuses_several_processes(excise, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = excise("inspect", tmp_path)
    assert status == 2
    assert "excise inspect does not divide its work among 2 processes; start one" in error


def test_by_itself_a_process_does_all(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = Team(*launched())
    assert team.first
    assert list(team.share("abc")) == ["a", "b", "c"]
    assert team.gather(3) == [3]
    assert team.once(lambda: 4) == 4
