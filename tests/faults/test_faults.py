"""A few of each campaign's faults; `make test-faults` does many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 2


def figures(module, *arguments, cache):
    """What a campaign prints; in a process of its own, since it forks."""
    command = [sys.executable, "-m", f"tests.faults.{module}", *map(str, arguments)]
    environment = {**os.environ, "EXCISE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.mark.parametrize(
    ("signal", "verb"),
    [pytest.param("SIGKILL", "heal", marks=pytest.mark.slow), ("SIGTERM", "score"), ("SIGKILL", "prune")],
)
def test_the_same_command_goes_on_after_a_kill(signal, verb, tmp_path):
    found = figures("kills", "--n", KILLS, "--signal", signal, "--verb", verb, cache=tmp_path)["verbs"][verb]
    assert found["wrong"] == []
    assert found["well"] == found["kills"] == KILLS


def test_no_flipped_byte_is_accepted_with_another_content(tmp_path):
    found = figures("flips", "--n", 12, cache=tmp_path)["artefacts"]
    assert found.keys() >= {"gradients", "energy", "spectrum", "run", "recipe", "teacher's shard", "journal", "ledger"}
    for kind, counts in found.items():
        assert (counts["WRONG"], counts["foreign"]) == ([], []), kind
        assert counts["refused"] + counts["made again"] > 0, kind


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk takes a superuser")
def test_a_full_disk_ends_in_one_line(tmp_path):
    try:
        found = figures("full_disk", "--n", 2, "--verb", "score", cache=tmp_path)["verbs"]["score"]
    except AssertionError as error:
        if "PermissionError" in str(error):
            pytest.skip("no right to mount a small disk")
        raise
    assert found["wrong"] == []
