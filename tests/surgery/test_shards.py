"""Shards written from byte ranges of others are what the library would have written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from excise.errors import CheckpointError, InputError
from excise.models.headers import INDEX, SINGLE, read_checkpoint
from excise.surgery import byte_copy
from excise.surgery.shards import parse_size, write_shards


def arrays(*names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 255, (3, i + 1), dtype=np.uint8) for i, name in enumerate(names)}


@pytest.mark.parametrize("max_shard_size", ["5GB", 20, 1])
def test_shards_written_are_the_librarys(tmp_path, max_shard_size):
    """Written in another order and under another name, in as many shards as the limit asks; and read back by both."""
    content = {**arrays("a", "b", "c", "d"), "e": np.zeros((0, 4), np.float32)}
    save_file(content, tmp_path / SINGLE, metadata={"format": "pt"})
    checkpoint = read_checkpoint(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    reordered = [t.renamed(f"new.{t.name}") for t in reversed(checkpoint.tensors)]
    files = write_shards(reordered, checkpoint.metadata, out, max_shard_size)
    assert {path.name for path in out.iterdir()} == {path.name for path in files}
    loaded = {}
    for path in out.glob("*.safetensors"):
        part = load_file(path)
        assert sum(a.nbytes for a in part.values()) <= parse_size(max_shard_size) or len(part) == 1
        loaded |= part
    assert loaded.keys() == {f"new.{name}" for name in content}
    assert all(np.array_equal(loaded[f"new.{name}"], array) for name, array in content.items())
    assert [(t.name, t.bytes) for t in read_checkpoint(out).tensors] == [(t.name, t.bytes) for t in reordered]
    if len(files) > 1:
        assert json.loads((out / INDEX).read_text())["metadata"] == {"total_size": checkpoint.bytes}


@pytest.mark.parametrize("way", byte_copy._WAYS, ids=lambda way: way.__name__)
def test_every_way_of_copying_copies(way, tmp_path, monkeypatch):
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(byte_copy, "_WAYS", (way,))
    monkeypatch.setattr(byte_copy, "CHUNK", 700_000)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb", buffering=0) as target:
        target.write(b"head")
        byte_copy.copy_range(source.fileno(), target.fileno(), 1_000, 2_500_000, "a")
        assert (tmp_path / "b").read_bytes() == b"head" + content[1_000:2_501_000]
        with pytest.raises(CheckpointError, match="became shorter"):
            byte_copy.copy_range(source.fileno(), target.fileno(), 2_900_000, 200_000, "a")


def test_a_way_the_kernel_refuses_is_followed_by_the_next(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(byte_copy, "_WAYS", (refused, byte_copy._by_buffer))
    (tmp_path / "a").write_bytes(b"0123456789")
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb", buffering=0) as target:
        byte_copy.copy_range(source.fileno(), target.fileno(), 2, 5, "a")
    assert (tmp_path / "b").read_bytes() == b"23456"


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("7", 7), (12, 12)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-5GB", 0, "1.5GB"])
def test_sizes_of_no_known_form_are_refused(text):
    with pytest.raises(InputError, match="such as 5GB"):
        parse_size(text)
