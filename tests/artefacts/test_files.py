from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest

from excise.artefacts import as_number, atomic_path, json_text, read_json, write_artefact, write_json
from excise.errors import InputError, OutputError


def test_a_file_appears_whole_and_replaces_the_old(tmp_path):
    final = tmp_path / "deep" / "result.json"
    for text in ("first", "second"):
        with atomic_path(final) as temporary:
            assert temporary.suffix == ".json"
            assert temporary.parent.parent == final.parent  # the same disk, so that renaming is atomic
            temporary.write_text(text)
        assert final.read_text() == text
    assert list(final.parent.iterdir()) == [final]


def test_a_folder_appears_whole_and_replaces_the_old(tmp_path):
    for name in ("first", "second"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def half_written(path, exception):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise exception


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_and_nothing_else(tmp_path, exception):
    final = tmp_path / "result.txt"
    final.write_text("old")
    with pytest.raises(exception):
        half_written(final, exception)
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "cannot write")],
)
def test_a_disk_that_takes_no_more_is_an_output_error(tmp_path, code, message):
    with pytest.raises(OutputError, match=message):
        half_written(tmp_path / "result.txt", OSError(code, "the system's own words"))
    assert list(tmp_path.iterdir()) == []


def test_other_system_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError, match="some other file"), atomic_path(tmp_path / "result.txt"):
        raise FileNotFoundError("some other file")


def test_json_of_numpy_values_and_paths(tmp_path):
    value = {"A": np.arange(4).reshape(2, 2), "x": np.float32(0.5), "n": np.int64(3), "p": Path("a/b"), "s": "é"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == {"A": [[0, 1], [2, 3]], "x": 0.5, "n": 3, "p": "a/b", "s": "é"}
    with pytest.raises(TypeError, match="cannot write set"):
        write_json(tmp_path / "other.json", {"s": {1}})
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_json_that_is_absent_or_broken_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"a": [1, 2')
    with pytest.raises(InputError, match="is not JSON"):
        read_json(tmp_path / "cut.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not JSON"):
        read_json(tmp_path / "binary.json")


NOT_FINITE = {
    "a loss": {"loss": math.nan, "steps": 3},
    "a gradient's norm": [{"grad_norm": math.inf}],
    "NumPy's scalar": {"x": np.float32("nan")},
    "inside an array": {"scores": np.array([1.0, -np.inf])},
    "alone": math.nan,
}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_json_is_strict_wherever_a_figure_is_not_finite(kind, tmp_path):
    def refused(constant):
        pytest.fail(f"bare {constant}")

    write_artefact(tmp_path / "value.json", {"value": NOT_FINITE[kind]})
    for text in ((tmp_path / "value.json").read_text(), json_text(NOT_FINITE[kind])):
        json.loads(text, parse_constant=refused)
        assert "null" in text
    assert (math.isnan(as_number(None)), as_number(2)) == (True, 2.0)


def test_files_for_other_programs_keep_infinity(tmp_path):
    """As transformers' configs have it: `"time_step_limit": [0.0, Infinity]`."""
    write_json(tmp_path / "config.json", {"limit": [0.0, math.inf]})
    assert json.loads((tmp_path / "config.json").read_text()) == {"limit": [0.0, math.inf]}


@pytest.mark.parametrize("write", [write_json, write_artefact])
def test_half_a_surrogate_pair_comes_back(tmp_path, write):
    """From names of files that are no UTF-8, and from rows of data."""
    write(tmp_path / "value.json", {"model": "caf\udce9", "plain": "café"})
    assert read_json(tmp_path / "value.json") == {"model": "caf\udce9", "plain": "café"}


def test_a_type_that_json_does_not_know_is_named_beside_a_figure_that_is_not_finite():
    with pytest.raises(TypeError, match="cannot write set"):
        json_text({"x": math.nan, "s": {1}})
