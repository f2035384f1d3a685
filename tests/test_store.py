"""What is kept under a key, found again, and worked out anew where it was damaged."""

import numpy as np
import pytest

from excise.errors import OutputError
from excise.store import Journal, Memory, Store

KEY = {"model": "a", "settings": {"batch_tokens": 4}}
OTHER = {"model": "a", "settings": {"batch_tokens": 5}}


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return Store(tmp_path / "store" if request.param == "folder" else None)


def test_a_journal_holds_what_was_written(store):
    journal = store.journal("stage", KEY)
    A = np.random.default_rng(0).standard_normal((3, 4))[:, ::2]  # not contiguous
    assert journal.get(2) is None
    journal.write(2, A=A, losses=np.float32([1, 2, 3]), seconds=np.array(1.5))
    piece = journal.get(2)
    np.testing.assert_array_equal(piece["A"], A)
    assert piece["losses"].dtype == np.float32
    assert float(piece["seconds"]) == 1.5
    assert journal.get(1) is None


def test_another_key_is_another_place_and_the_order_of_a_key_does_not_matter(store):
    store.journal("stage", KEY).write(0, A=np.ones(2))
    assert store.journal("stage", OTHER).get(0) is None
    assert store.journal("another stage", KEY).get(0) is None
    np.testing.assert_array_equal(store.journal("stage", dict(reversed(KEY.items()))).get(0)["A"], [1, 1])


def test_a_process_finds_what_another_kept(tmp_path):
    first, later = Store(tmp_path), Store(tmp_path)
    first.journal("stage", KEY).write(0, A=np.ones(2))
    first.ledger("sums", KEY).add([(), (1, 2)], np.arange(6.0).reshape(2, 3))
    first.keep("memo", KEY, {"rounds": [[1, 2]]})
    np.testing.assert_array_equal(later.journal("stage", KEY).get(0)["A"], [1, 1])
    assert set(later.ledger("sums", KEY)) == {(), (1, 2)}
    np.testing.assert_array_equal(later.ledger("sums", KEY)[(1, 2)], [3, 4, 5])
    assert later.found("memo", KEY) == {"rounds": [[1, 2]]}
    assert later.found("memo", OTHER) is None


def test_what_is_deleted_is_gone_and_the_rest_stays(store):
    store.journal("stage", KEY).write(0, A=np.ones(2))
    store.keep("memo", KEY, 3)
    store.delete("stage")
    assert store.journal("stage", KEY).get(0) is None
    assert store.found("memo", KEY) == 3
    store.delete()
    assert store.found("memo", KEY) is None


def _flipped(content):
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


@pytest.mark.parametrize("damage", [lambda c: c[:-9], _flipped, lambda c: b"", lambda c: b"\0" * len(c)])
def test_damaged_files_are_told_and_hold_nothing(tmp_path, damage):
    store = Store(tmp_path)
    store.journal("stage", KEY).write(7, A=np.ones(20))
    store.ledger("sums", KEY).add([(1,)], np.ones((1, 3)))
    store.keep("memo", KEY, {"rounds": [[1, 2]], "x": "y"})
    for path in (*tmp_path.rglob("*.safetensors"), *(tmp_path / "memo").glob("*.json")):
        path.write_bytes(damage(path.read_bytes()))
    again = Store(tmp_path)
    with pytest.warns(UserWarning, match="batch-000007.safetensors is damaged"):
        assert again.journal("stage", KEY).get(7) is None
    with pytest.warns(UserWarning, match="part-.* is damaged"):
        assert list(again.ledger("sums", KEY)) == []
    with pytest.warns(UserWarning, match="json is damaged"):
        assert again.found("memo", KEY) is None


def test_values_that_json_does_not_know_make_no_key(store):
    with pytest.raises(TypeError):
        store.keep("memo", {"objective": object()}, 1)


def test_a_folder_that_the_user_named_is_refused_if_it_holds_something_else(tmp_path):
    Journal(tmp_path, KEY).write(0, A=np.ones(2))
    with pytest.raises(OutputError, match="other settings"):
        Journal(tmp_path, OTHER)


def test_memory_forgets_the_oldest_but_never_the_newest():
    memory = Memory(most=100)
    for name, size in (("a", 5), ("b", 5), ("c", 100)):
        memory.keep(name, np.zeros(size))
    assert memory.get("a") is memory.get("b") is None
    assert memory.get("c").shape == (100,)
