from __future__ import annotations

import numpy as np
import pytest

from excise.errors import OutputError
from excise.measuring.journal import Journal

KEY = {"stage": "test", "model": "a", "settings": {"batch_tokens": 4}}


@pytest.mark.parametrize("on_disk", [False, True])
def test_holds_what_was_written(tmp_path, on_disk):
    journal = Journal(tmp_path / "journal" if on_disk else None, KEY)
    A = np.random.default_rng(0).standard_normal((3, 4))[:, ::2]  # not contiguous
    assert 2 not in journal
    journal.write(2, A=A, losses=np.float32([1, 2, 3]))
    assert 2 in journal
    assert 1 not in journal
    piece = journal.read(2)
    np.testing.assert_array_equal(piece["A"], A)
    assert piece["losses"].dtype == np.float32
    assert (tmp_path / "journal").exists() == on_disk


def test_another_process_goes_on_with_it(tmp_path):
    Journal(tmp_path, KEY).write(0, A=np.ones(2))
    again = Journal(tmp_path, dict(reversed(KEY.items())))  # the order of the key does not matter
    assert 0 in again
    np.testing.assert_array_equal(again.read(0)["A"], [1, 1])


def test_another_key_is_refused(tmp_path):
    Journal(tmp_path, KEY).write(0, A=np.ones(2))
    with pytest.raises(OutputError, match="other settings"):
        Journal(tmp_path, {**KEY, "settings": {"batch_tokens": 5}})


def test_a_damaged_batch_is_named(tmp_path):
    journal = Journal(tmp_path, KEY)
    journal.write(7, A=np.ones(20))
    file = tmp_path / "batch-000007.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"batch-000007.safetensors is damaged"):
        journal.read(7)


def test_leaves_only_whole_files(tmp_path):
    journal = Journal(tmp_path, KEY)
    journal.write(0, A=np.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch-000000.safetensors", "key.json"]
