"""What cannot be written is known before anything is measured."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from excise.errors import ArchitectureError, CheckpointError, InputError, OutputError
from excise.surgery import on_disk
from excise.surgery.feasible import require_writable
from tests.released import edit_json
from tests.tiny import tiny_folder, tiny_model


def folder(place, of="llama", **config):
    source = tiny_folder(place / "model", of)
    edit_json(source / "config.json", **config)
    return source


def quantised(place):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return {"source": None, "changes": model}


def packed(place):
    model = tiny_model("llama")
    model.hf_quantizer = type("Quantizer", (), {"packed_modules": {"x": None}})()
    return {"source": None, "changes": model}


def adapter(place):
    source = folder(place)
    (source / "adapter_config.json").write_text("{}")
    return {"source": source}


def truncated(place):
    source = folder(place)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-9])
    return {"source": source}


def occupied(place):
    (place / "out").mkdir()
    (place / "out" / "chapter.txt").write_text("years of work")
    return {"source": folder(place), "overwrite": True}


def a_file_in_the_way(place):
    (place / "taken").write_text("")
    return {"source": folder(place), "out": place / "taken" / "out"}


# What is asked → arguments beside `out`, the error and what it says.
REFUSED = {
    "an unknown model type": (lambda p: {"source": folder(p, model_type="nonesuch")}, ArchitectureError, "nonesuch"),
    "blocks that depend on their place": (
        lambda p: {"source": folder(p, "gpt2", scale_attn_by_inverse_layer_idx=True)},
        ArchitectureError,
        "scale_attn_by_inverse_layer_idx",
    ),
    "no period that describes what is left": (
        lambda p: {"source": folder(p, "jamba"), "removed": [2, 3]},
        ArchitectureError,
        "evenly spaced",
    ),
    "the last block of a needed type": (
        lambda p: {"source": folder(p, "lfm2"), "removed": [2, 5]},
        ArchitectureError,
        "must stay",
    ),
    "a block outside the stack": (lambda p: {"source": folder(p), "removed": [6]}, InputError, "between 0 and 5"),
    "blocks that the config does not count": (
        lambda p: {"source": folder(p, num_hidden_layers=5)},
        CheckpointError,
        "do not belong together",
    ),
    "a truncated file": (truncated, CheckpointError, "truncated"),
    "an adapter": (adapter, CheckpointError, "adapter"),
    "changes of quantised weights": (quantised, CheckpointError, "bitsandbytes"),
    "changes of packed weights": (packed, CheckpointError, "packed"),
    "a folder with something else": (occupied, OutputError, "not written by excise"),
    "a file in the way": (a_file_in_the_way, OutputError, "not a folder you may write to"),
    "the original's own place": (
        lambda p: {"source": folder(p), "out": p / "model", "overwrite": True},
        OutputError,
        "is what is being read",
    ),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_writing_would_refuse_is_refused_at_once(asked, tmp_path):
    arguments, error, message = REFUSED[asked]
    given = {"out": tmp_path / "out", **arguments(tmp_path)}
    with pytest.raises(error, match=message):
        require_writable(given.pop("source"), given.pop("out"), given.pop("removed", ()), **given)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_place_without_leave(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="may write to"):
        require_writable(None, tmp_path / "locked" / "out")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    source = folder(tmp_path)
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="are free there"):
        require_writable(source, tmp_path / "out", [1])
    require_writable(source, tmp_path / "out")  # how much it will be is not known yet


def test_what_can_be_written_passes_and_nothing_is_touched(tmp_path):
    source = folder(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    start = time.perf_counter()
    require_writable(source, tmp_path / "a" / "out", [1, 4], changes=tiny_model("llama"))
    assert time.perf_counter() - start < 2
    require_writable(None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["prune", "heal"])
def test_the_verbs_ask_before_they_work(verb, tmp_path, excise):
    """A removal that no config describes, or a place that is taken, costs no gradient and no training."""
    source = tiny_folder(tmp_path / "model", "jamba")
    (tmp_path / "taken").write_text("")
    if verb == "prune":
        repaired = ("--removed", "2,3", "--repair", "--data", "absent.jsonl")
        code, _, err = excise("prune", source, *repaired, "--out", tmp_path / "out")
        expected = "evenly spaced"
    else:
        options = ("--teacher", source, "--data", "starter", "--samples", 4, "--tokens", 16, "--steps", 1)
        code, _, err = excise("heal", source, *options, "--out", tmp_path / "taken" / "out")
        expected = "not a folder you may write to"
    assert code == 2
    assert expected in err
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".*work*"))
