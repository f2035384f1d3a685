"""What was written is known again; what was damaged, edited or comes from a newer excise is not taken for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from excise.artefacts import facts_of, key_of, read_arrays, read_json, write_arrays, write_artefact, write_json
from excise.errors import InputError

VALUE = {"losses": [1.5, float("nan"), 1e-300], "blocks": (2, 3), "name": "Ünïcode", "deep": {"a": None, "b": [True]}}
ARRAYS = {"A": np.arange(6.0).reshape(2, 3), "mask": np.array([True, False]), "empty": np.zeros((0, 4))}


def test_json_comes_back_without_its_seal_and_knows_its_key(tmp_path):
    write_artefact(tmp_path / "a.json", VALUE, key="k1")
    assert read_json(tmp_path / "a.json") == {**VALUE, "losses": [1.5, None, 1e-300], "blocks": [2, 3], "made_by": "k1"}
    assert key_of(tmp_path / "a.json") == "k1"
    write_artefact(tmp_path / "b.json", VALUE)
    assert key_of(tmp_path / "b.json") is None


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_arrays_come_back_with_their_facts(tmp_path, framework):
    arrays = ARRAYS if framework == "np" else {"w": torch.ones(2, 3, dtype=torch.bfloat16).T}
    write_arrays(tmp_path / "a.safetensors", arrays, {"format": "x 1"}, key="k1")
    found, facts = read_arrays(tmp_path / "a.safetensors", framework)
    assert facts == {"format": "x 1", "made_by": "k1"}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert (found[name] == array).all()
    assert key_of(tmp_path / "a.safetensors") == "k1"


def test_equal_content_has_equal_bytes(tmp_path):
    for name in "ab":
        write_arrays(tmp_path / name, ARRAYS, {"x": 1, "y": 2, "z": 3})
        write_artefact(tmp_path / f"{name}.json", VALUE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_every_byte_of_a_safetensors_file_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS, {"format": "x 1"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found, facts = read_arrays(path)
        except InputError:
            continue
        # The entry's name was hit, and what is left is no artefact of ours, but what it holds is what was written.
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in ARRAYS.items()
        }
        assert facts.get("format") in ("x 1", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value | {"name": "other"}, "damaged or edited"),
        (lambda value: value | {"further": 1}, "damaged or edited"),
        (lambda value: value | {"seal": {"version": 99, "sha256": "0" * 64}}, "newer excise .format 99, .* up to 1"),
        (lambda value: value | {"seal": "broken"}, "damaged or edited"),
        (lambda value: value | {"seal": {"version": "1", "sha256": 3}}, "damaged or edited"),
    ],
)
def test_what_was_changed_is_refused(tmp_path, change, message):
    write_artefact(tmp_path / "a.json", VALUE)
    (tmp_path / "a.json").write_text(json.dumps(change(json.loads((tmp_path / "a.json").read_text()))))
    with pytest.raises(InputError, match=message) as refused:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(refused.value)


def test_what_has_no_seal_is_taken_as_it_is(tmp_path):
    write_json(tmp_path / "config.json", {"seal_of": 1})
    assert read_json(tmp_path / "config.json") == {"seal_of": 1}
    write_artefact(tmp_path / "a.json", {"x": 1})
    edited = {name: entry for name, entry in json.loads((tmp_path / "a.json").read_text()).items() if name != "seal"}
    write_json(tmp_path / "a.json", edited | {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 2}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"[" * 100_000])
def test_what_is_no_such_file_is_said_by_name(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors is damaged, or no safetensors file"):
        facts_of(tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_bytes(content)
    if content != b"{}":
        with pytest.raises(InputError, match=r"a\.json is not JSON"):
            read_json(tmp_path / "a.json")
    assert key_of(tmp_path / "a.json") is key_of(tmp_path / "a.safetensors") is None
