"""One process at a time, whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from excise.artefacts import HeldError, atomic_path, clear_leftovers, clear_leftovers_in, locked

HOLD = "import sys; from excise.artefacts import locked; from pathlib import Path\nwith locked(Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True); sys.stdin.read()"
WRITE = "import sys; from excise.artefacts import atomic_path\nwith atomic_path(sys.argv[1]) as path:\n"
WRITE += "    path.write_text('half'); print('half', flush=True); sys.stdin.read(); path.write_text('whole')"


def started(code, path):
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


def test_the_second_is_told_who_holds_it_and_the_lock_ends_with_its_process(tmp_path):
    path = tmp_path / ".out.lock"
    with started(HOLD, path) as other:
        with pytest.raises(HeldError, match=rf"is held by process {other.pid} on .* since 20"), locked(path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(path):
            assert path.exists()
    assert not path.exists()


def test_the_same_process_does_not_hold_it_twice(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(HeldError, match=f"process {os.getpid()}"),
        locked(tmp_path / "lock"),
    ):
        pass


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    out = tmp_path / "deep" / "out.json"
    with started(WRITE, out) as dead:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
    assert list(out.parent.glob(".*.partial"))
    with started(WRITE, out) as living:
        clear_leftovers(out)
        clear_leftovers_in(tmp_path)
        assert len(list(out.parent.glob(".*.partial"))) == 1
        living.communicate("")
    assert out.read_text() == "whole"
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_what_was_put_aside_comes_back(tmp_path):
    """A process that died between moving the old folder away and giving its name to the new one."""
    old = tmp_path / ".out.abcdefgh.partial" / ".old"
    old.mkdir(parents=True)
    (old / "weights").write_text("years of training")
    clear_leftovers(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "years of training"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "file.json")
    with atomic_path(tmp_path / "link.json") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "elsewhere" / "file.json").read_text() == "{}"


def test_results_have_the_rights_that_the_user_gives(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            save_file({"x": np.ones(1)}, temporary / "file")
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("folder", "folder/file", "file")]
    assert modes == [0o755, 0o644, 0o644]
