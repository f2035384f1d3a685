"""A job is recognised by everything that determines it, and by nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from excise import job
from excise.artefacts import write_artefact
from excise.errors import OutputError
from excise.job import starting
from excise.settings import Printing, Replacing, option


@dataclass(frozen=True, kw_only=True)
class WalkSettings(Replacing, Printing):
    source: str = option(..., "What is read.", argument=True, reads="path")
    data: str = option("starter", "What is read besides.", reads="data")
    steps: int = option(3, "How many.")
    out: Path = option(..., "What is written.", writes="file")


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1 2 3")
    (tmp_path / "data.txt").write_text("a text")
    return WalkSettings(
        source=str(tmp_path / "model"), data=f"{tmp_path / 'data.txt'}:2,starter:1", out=tmp_path / "out.json"
    )


def test_the_key_is_of_settings_and_contents(settings, tmp_path):
    def made_by(settings):
        job.made_by.cache_clear()
        return job.made_by(settings)

    key = made_by(settings)
    (tmp_path / "model").rename(tmp_path / "moved")
    for same in (
        replace(settings, source=str(tmp_path / "moved")),
        replace(settings, source=str(tmp_path / "moved"), out=tmp_path / "other.json", force=True, as_json=True),
    ):
        assert made_by(same) == key
    (tmp_path / "moved" / "README.md").write_text("a card")
    assert made_by(replace(settings, source=str(tmp_path / "moved"), force=True)) == key
    (tmp_path / "moved" / "weights").write_text("1 2 4")
    moved = replace(settings, source=str(tmp_path / "moved"))
    keys = {key, made_by(moved), made_by(replace(moved, steps=4))}
    (tmp_path / "data.txt").write_text("another text")
    assert len(keys | {made_by(moved)}) == 4


def test_the_key_is_of_shares_and_of_how_a_source_is_read(settings, tmp_path):
    file = tmp_path / "data.txt"
    datas = (f"{file}", f"self={file}", f"self@0.8={file}", f"{file}:1,starter:2", f"{file}:2,starter:1", "starter")
    assert len({job.made_by(replace(settings, data=data)) for data in datas}) == len(datas)
    (tmp_path / "elsewhere").mkdir()
    key = job.made_by(settings)
    file.rename(tmp_path / "elsewhere" / "data.txt")
    moved = replace(settings, data=settings.data.replace(str(tmp_path), str(tmp_path / "elsewhere")))
    assert job.made_by(moved) == key


def test_a_finished_job_is_recognised_and_force_begins_it_again(settings):
    with starting(settings) as begun:
        assert not begun.done
        write_artefact(settings.out, {"x": 1}, key=job.made_by(settings))
    with starting(settings) as begun:
        assert begun.done
    with starting(replace(settings, force=True)) as begun:
        assert not begun.done
    with pytest.raises(OutputError, match="--force"), starting(replace(settings, steps=4)):
        pass


def test_one_process_at_a_time(settings):
    with (
        starting(settings),
        pytest.raises(OutputError, match=r"out\.json is in use: .* held by process \d+ .*Wait for it"),
        starting(settings),
    ):
        pass
    with starting(settings):
        pass
    assert not list(settings.out.parent.glob(".*"))


def test_several_processes_of_one_job_share_the_first_ones_lock(settings, monkeypatch):
    with starting(settings):
        monkeypatch.setenv("RANK", "1")
        with starting(settings) as other:
            assert not other.done


def test_commands_that_are_repeated_are_done(excise, tmp_path):
    matrix = tmp_path / "H.npy"
    np.save(matrix, np.diag([3.0, 1.0, 2.0, 4.0]))
    command = ("solve", "--hessian", matrix, "--remove", 2, "--out", tmp_path / "s.json")
    assert excise(*command)[0] == 0
    first = (tmp_path / "s.json").read_bytes()
    status, out, err = excise(*command)
    assert (status, out) == (0, "")
    assert err == f"already done: {tmp_path / 's.json'} was made by this command; --force makes it again\n"
    status, out, _ = excise(*command, "--json")
    assert (status, json.loads(out)) == (0, {"out": str(tmp_path / "s.json"), "already_done": True})
    assert (tmp_path / "s.json").read_bytes() == first
    assert excise(*command, "--seed", 1)[0] == 2
    np.save(matrix, np.diag([3.0, 1.0, 2.0, 0.5]))
    status, _, err = excise(*command)
    assert status == 2
    assert "--overwrite" in err or "--force" in err
    assert excise(*command, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["states"][0]["removed"] == [1, 3]
