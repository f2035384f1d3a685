"""Hashes of files are found again only for the very same file, and whatever happens to the cache, they are right."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from excise.errors import InputError
from excise.models import file_hashes
from excise.models.file_hashes import cache_folder, sha256_of, sha256_of_each

CONTENT, OTHER = b"weights" * 1000, b"WEIGHTS" * 1000
FORGED = "f" * 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def at_once(monkeypatch):
    """Keep hashes of files just written too."""
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -1_000_000_000)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def true_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry_of(cache):
    (entry,) = cache.rglob("*.json")
    return entry


def forge(cache):
    """Make the cache lie, so that a hash taken from it is told from one that was computed."""
    entry = entry_of(cache)
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "sha256": FORGED}))


def touch(path):
    os.utime(path)


def replace_by_another_of_the_same_size_and_time(path):
    found, other = path.stat(), path.with_name("other")
    other.write_bytes(OTHER)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


def overwrite_and_set_the_time_back(path):
    found = path.stat()
    with path.open("r+b") as file:
        file.write(OTHER)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def append(path):
    path.write_bytes(CONTENT + b".")


def link_to_another(path):
    other = path.with_name("other")
    other.write_bytes(OTHER)
    path.unlink()
    path.symlink_to(other)


def test_a_hash_is_found_again_without_reading(file, cache, at_once):
    assert sha256_of(file) == true_hash(file)
    forge(cache)
    assert sha256_of(file) == FORGED
    assert sha256_of(str(file)) == FORGED


@pytest.mark.parametrize(
    "change",
    [
        touch,
        replace_by_another_of_the_same_size_and_time,
        overwrite_and_set_the_time_back,
        append,
        link_to_another,
    ],
    ids=lambda change: change.__name__,
)
def test_a_file_that_was_touched_in_any_way_is_read(file, cache, at_once, change):
    sha256_of(file)
    forge(cache)
    change(file)
    assert sha256_of(file) == true_hash(file)


def test_what_was_written_a_moment_ago_is_not_kept(file, cache):
    assert sha256_of(file) == true_hash(file)
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"path": 1}', b'{"sha256": "f"}', b"\x00" * 100],
    ids=str,
)
def test_a_damaged_cache_only_costs_time(file, cache, at_once, content):
    sha256_of(file)
    entry_of(cache).write_bytes(content)
    assert sha256_of(file) == true_hash(file)
    forge(cache)
    assert sha256_of(file) == FORGED  # it was repaired


@pytest.mark.parametrize("digest", ["", "f" * 63, "F" * 64, 7, None, ["f" * 64]])
def test_what_is_no_hash_is_not_believed(file, cache, at_once, digest):
    sha256_of(file)
    entry = entry_of(cache)
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "sha256": digest}))
    assert sha256_of(file) == true_hash(file)


def test_a_cache_that_cannot_be_written_only_costs_time(file, cache, at_once):
    cache.write_text("a file where the folder should be")
    assert sha256_of(file) == true_hash(file)
    assert cache.is_file()


def test_many_at_once_neither_disturb_each_other_nor_the_cache(tmp_path, cache, at_once):
    files = [tmp_path / f"shard-{k}" for k in range(6)]
    for k, path in enumerate(files):
        path.write_bytes(bytes([k]) * 10_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(sha256_of_each, [files] * 16))
    assert set(found) == {tuple(map(true_hash, files))}
    assert {json.loads(path.read_text())["sha256"] for path in cache.rglob("*.json")} == set(found[0])
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".json"] == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EXCISE_CACHE": "/a/b"}, Path("/a/b")),
        ({"EXCISE_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, Path("/a/b")),
        ({"XDG_CACHE_HOME": "/c"}, Path("/c/excise")),
        ({}, Path("/home/me/.cache/excise")),
    ],
    ids=str,
)
def test_the_cache_is_where_the_user_has_it(monkeypatch, variables, expected):
    for name in ("EXCISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent"):
        sha256_of(tmp_path / "absent")
