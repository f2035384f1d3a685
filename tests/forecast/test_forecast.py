"""What a job will take, from the config alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from excise.cli import terminal
from excise.data import Fit
from excise.errors import InputError
from excise.forecast import Advice, Shape, Speed, Work, forecast, outline
from excise.models.architectures import ARCHITECTURES
from excise.models.stack import find_stack
from tests.tiny import MODEL_TYPES, tiny_folder, tiny_model

WORK = Work(
    removed=2,
    calibration=1000,
    held_out=200,
    effort=4.0,
    repair_tokens=1000,
    batch_tokens=128,
    item=4,
    stored=2,
    room=1e9,
)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_are_those_of_the_loaded_model(model_type):
    model = tiny_model(model_type, 6)
    stack, shape = find_stack(model), Shape.of(model.config)
    assert list(shape.blocks) == [block.parameters for block in stack.blocks]
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.width == model.get_input_embeddings().weight.shape[1]
    assert all(active <= all_of_it for active, all_of_it in zip(shape.active, shape.blocks, strict=True))
    assert Fit.described(model.config) == Fit.of(stack)
    routed = any(record.kind == "moe" for record in ARCHITECTURES[model.config.model_type].sublayers)
    assert routed or shape.active == shape.blocks


def test_streaming_takes_less_memory_and_more_reads():
    shape = Shape.of(tiny_model("llama", 6).config)
    resident, streamed = (forecast(shape, WORK, placement) for placement in ("resident", "streamed"))
    assert [stage.name for stage in resident.stages] == [stage.name for stage in streamed.stages]
    assert streamed.stages[0].memory < resident.stages[0].memory
    assert streamed.read > resident.read
    # Streams upwards, gradients downwards.
    (gradients,) = (stage for stage in streamed.stages if stage.name == "gradients")
    assert gradients.read == 2 * sum(shape.blocks) * WORK.stored
    assert resident.seconds is None


def test_time_follows_work_and_speed():
    shape = Shape.of(tiny_model("llama", 6).config)
    slow, fast = (Speed(forward, 2.0, forward, float("inf")) for forward in (1e9, 2e9))
    one, other = (forecast(shape, WORK, "resident", speed) for speed in (slow, fast))
    # Starting, and the solves of a refinement, take what they take.
    fixed = {"load", "refinement"}
    for a, b in zip(one.stages, other.stages, strict=True):
        assert a.seconds > b.seconds or a.name not in {"gradients", "repair"}
        assert a.name in fixed or a.seconds == pytest.approx(2 * b.seconds)
    assert one.seconds == pytest.approx(sum(stage.seconds for stage in one.stages))


@pytest.mark.parametrize(
    ("free", "whole", "placement", "reason"),
    [
        (1.0, "", "resident", "the whole model fits"),
        (0.7, "", "streamed", "it fits block by block"),
        (0.1, "", "streamed", "not even block by block does it fit; .* takes the most: fewer --samples"),
        (0.7, "it is read whole", "resident", "it is read whole; .* takes the most"),
    ],
)
def test_the_placement_advised_is_the_one_that_fits(free, whole, placement, reason):
    shape = replace(Shape.of(tiny_model("llama", 6).config), blocks=(10**9,) * 6, active=(10**9,) * 6)
    both = [forecast(shape, WORK, placement) for placement in ("resident", "streamed")]
    advice = Advice(both, free * both[0].memory, whole)
    assert advice.placement == placement
    assert re.match(reason, advice.reason)
    assert advice.describe()["placement"] == placement


@pytest.mark.parametrize(
    ("asked", "free", "placed"), [("auto", 1, "streamed"), ("auto", 1e12, "resident"), ("resident", 1, "resident")]
)
def test_a_run_tells_what_it_will_take_before_it_loads(asked, free, placed, excise, tmp_path, monkeypatch):
    model, options = tiny_folder(tmp_path / "model", layers=3), {}

    def load_model(source, **given):
        options.update(given)
        raise InputError("loaded")

    monkeypatch.setattr(outline, "free_memory", lambda *_: free)
    monkeypatch.setattr(terminal, "load_model", load_model)
    run = ("run", model, "--remove", 1, "--out", tmp_path / "run", "--samples", 4, "--tokens", 16, "--held-out", 2)
    _, output, error = excise(*run, "--placement", asked, "--json")
    assert options["placement"] == placed
    assert output == ""
    told = " ".join(error.split())
    assert re.search(r"plan: memory, resident / streamed: load .* / .*, gradients .*, write and test", told)
    assert ("the whole model fits" in told) == (free > 1)
    assert told.endswith("error: loaded")
    monkeypatch.setattr(terminal.console, "quiet", True)
    assert "plan:" not in excise(*run, "--force")[2]


def test_the_verb_says_what_fits(excise, tmp_path):
    model = tiny_folder(tmp_path / "model")
    plan = ("plan", model, "--remove", 2, "--samples", 8, "--tokens", 24, "--held-out", 4, "--json")
    status, output, _ = excise(*plan, "--measure")
    assert status == 0
    found = json.loads(output)
    assert found["fits"] == ["resident", "streamed"]
    assert all(stage["seconds"] > 0 for stage in found["forecasts"][1]["stages"] if stage["read"])
    status, output, _ = excise(*plan, "--memory", 0.1)
    assert json.loads(output)["fits"] == []


def test_a_gguf_file_is_refused(excise, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    status, _, error = excise("plan", tmp_path / "model.gguf", "--remove", 2)
    assert status == 2
    assert "a GGUF file is read whole" in error
