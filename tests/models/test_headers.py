"""Safetensors headers: read as the library reads them, and refused in every way that a file can be wrong."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from excise.errors import CheckpointError, InputError
from excise.models.headers import INDEX, SINGLE, read_checkpoint, read_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_file(path, header, data=b"", length=None):
    """A safetensors file, right or wrong: `header` as a dict or as text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def write_sharded(folder, shards, **changes):
    """Shards {file: {name: array}} with an index, of which `changes` (name → file, or None) are made."""
    places = {}
    for file, arrays in shards.items():
        save_file(arrays, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(arrays, file)
    places = {name: file for name, file in (places | changes).items() if file is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def arrays(*names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 255, (3, i + 1), dtype=np.uint8) for i, name in enumerate(names)}


def test_a_header_reads_as_the_library_reads_it(tmp_path):
    content = {**arrays("a", "b"), "c": np.zeros((0, 4), np.float32), "d": np.array(3.5)}
    save_file(content, tmp_path / SINGLE, metadata={"format": "pt", "by": "me"})
    tensors, metadata = read_header(tmp_path / SINGLE)
    assert metadata == {"format": "pt", "by": "me"}
    raw = (tmp_path / SINGLE).read_bytes()
    with safe_open(tmp_path / SINGLE, framework="np") as file:
        assert {t.name for t in tensors} == set(content)
        for tensor in tensors:
            view = file.get_slice(tensor.name)
            assert (tensor.dtype, list(tensor.shape)) == (view.get_dtype(), view.get_shape())
            assert raw[tensor.start : tensor.start + tensor.bytes] == content[tensor.name].tobytes()


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": ENTRY}, b"\0" * 8, 10**12, "its header claims"),
        ({"a": ENTRY}, b"\0" * 8, 2**63, "its header claims"),
        ({"a": ENTRY}, b"\0" * 8, 0, "its header claims"),
        ({"a": ENTRY}, b"\0" * 7, None, "describes"),
        ({"a": ENTRY}, b"\0" * 9, None, "describes"),
        ("{ ", b"", None, "not JSON"),
        ("[" * 100_000, b"", None, "not JSON"),
        ("[1, 2]", b"", None, "no JSON object"),
        ("\xff\xfe{}", b"", None, "not JSON"),
        (f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}', b"\0" * 8, None, "'a' twice"),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 8, None, "overlap before b"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12, None, "overlap before b"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, b"\0" * 24, None, "leave a gap before b"),
        ({"a": {**ENTRY, "data_offsets": [0, 16]}}, b"\0" * 16, None, "needs 8 bytes and has 16"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"\0" * 8, None, "needs 8 bytes and has -8"),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, b"\0" * 8, None, "no sound dtype"),
        ({"a": {**ENTRY, "shape": [2.0]}}, b"\0" * 8, None, "no sound dtype"),
        ({"a": {**ENTRY, "shape": [-1, -2]}}, b"\0" * 8, None, "no sound dtype"),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"\0" * 8, None, "needs"),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"\0" * 8, None, "'F31'; known are"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 8, None, "no sound dtype"),
        ({"a": [1, 2]}, b"", None, "no sound dtype"),
        ({"__metadata__": {"format": 3}, "a": ENTRY}, b"\0" * 8, None, "metadata"),
    ],
)
def test_damaged_headers_are_refused(header, data, length, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_header(write_file(tmp_path / "x.safetensors", header, data, length))


@pytest.mark.parametrize("size", [0, 7, 8])
def test_files_too_short_for_a_header_are_refused(size, tmp_path):
    (tmp_path / SINGLE).write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "..\\a.safetensors", "a.bin", "", "..", "a\0.s"],
)
def test_an_index_that_points_elsewhere_is_refused(name, tmp_path):
    save_file(arrays("a"), tmp_path / "a.safetensors")
    (tmp_path / "in").mkdir()
    write_sharded(tmp_path / "in", {"b.safetensors": arrays("b")}, a=name)
    with pytest.raises(CheckpointError, match="names the file"):
        read_checkpoint(tmp_path / "in")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": ["x.safetensors"]}])
def test_an_index_without_a_weight_map_is_refused(weight_map, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    shards = {"x.safetensors": arrays("a", "b"), "y.safetensors": arrays("c")}
    assert len(read_checkpoint(write_sharded(tmp_path, shards)).tensors) == 3
    for changes, message in (
        ({"d": "x.safetensors"}, "1 tensors that .* names are in no shard .first: d."),
        ({"b": None}, "tensor b is in x.safetensors, but .* has it in nowhere"),
        ({"b": "y.safetensors"}, "tensor b is in x.safetensors, but .* has it in y.safetensors"),
        ({"d": "z.safetensors"}, r"lacks z\.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(write_sharded(tmp_path, shards, **changes))
    write_sharded(tmp_path, {**shards, "y.safetensors": arrays("c", "a")}, a="x.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in both x\.safetensors and y\.safetensors"):
        read_checkpoint(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="pickle weights only"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has neither"):
        read_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        read_checkpoint(tmp_path / "absent")
