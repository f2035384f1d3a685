"""Teachers: the same lesson from memory and from disk, resumable recordings, and quantised ones."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from excise.artefacts import read_arrays
from excise.context import Context
from excise.data.batches import make_batches
from excise.errors import InputError, OutputError
from excise.healing.losses import vocabulary_loss
from excise.healing.teachers import OfflineTeacher, OnlineTeacher, load_teacher, record_teacher
from excise.measuring.sweep import sweeps
from excise.models.stack import find_stack, first
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import VOCABULARY, tiny_folder, tiny_model

LENGTHS = (9, 5, 14, 2, 7, 5)


@pytest.fixture(scope="module")
def teacher():
    return find_stack(tiny_model("llama", 3))


def losses_by(teacher, samples, order):
    """Loss of another model on batches of samples in a given order."""
    student = find_stack(tiny_model("llama", 2, seed=1))
    values = []
    for number in order:
        batch = make_batches(samples, 30)[number]
        lesson = teacher.lesson(batch.input_ids, batch.labels, batch.indices, ())
        with torch.no_grad():
            hidden = student.hidden(batch.input_ids)
        loss = vocabulary_loss(student, hidden, batch.labels, lesson.targets, temperature=teacher.temperature)
        values.append(loss.total)
    return torch.stack(values)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_vocabulary_on_disk_teaches_what_memory_does(teacher, tmp_path, temperature):
    samples = random_samples(LENGTHS)
    index = record_teacher(
        context_of(teacher, batch_tokens=12), samples, tmp_path, k=VOCABULARY, temperature=temperature
    )
    assert index["kept_mass"] == pytest.approx(1)
    assert index["positions"] == sum(sample.targets for sample in samples)
    offline = OfflineTeacher.open(tmp_path, samples)
    assert offline.temperature == temperature
    order = range(len(make_batches(samples, 30)))
    expected = losses_by(OnlineTeacher(teacher, temperature), samples, order)
    torch.testing.assert_close(losses_by(offline, samples, order), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_a_streamed_teacher_records_what_one_in_memory_does(model_type, tmp_path):
    samples, folder = random_samples(LENGTHS), str(tiny_folder(tmp_path / "model", model_type, 4))
    contexts = {
        placement: Context(load_teacher(folder, placement=placement), batch_tokens=12)
        for placement in ("resident", "streamed")
    }
    assert sweeps(contexts["streamed"].stack)
    facts = {name: record_teacher(context, samples, tmp_path / name, k=8) for name, context in contexts.items()}
    assert facts["streamed"] == facts["resident"]
    for shard in (tmp_path / "resident").glob("batch-*.safetensors"):
        recorded, _ = read_arrays(shard)
        streamed, _ = read_arrays(tmp_path / "streamed" / shard.name)
        for name, array in recorded.items():
            np.testing.assert_allclose(streamed[name], array, rtol=1e-6)


def test_a_quantised_teacher_is_not_streamed(tmp_path):
    with pytest.raises(InputError, match="stays in memory"):
        load_teacher(str(tmp_path), "nf4", placement="streamed")


def test_more_tokens_come_nearer_and_the_kept_mass_is_what_it_says(teacher, tmp_path):
    samples = random_samples(LENGTHS)
    order = range(len(make_batches(samples, 30)))
    full = losses_by(OnlineTeacher(teacher), samples, order)
    errors, masses = [], []
    for k in (1, 16, 128):
        index = record_teacher(context_of(teacher), samples, tmp_path / str(k), k=k)
        offline = OfflineTeacher.open(tmp_path / str(k), samples)
        errors.append((full - losses_by(offline, samples, order)).abs().max().item())
        masses.append(index["kept_mass"])
    assert errors[0] > errors[1] > errors[2]
    logits = [teacher.logits(teacher.hidden(torch.from_numpy(s.input_ids)[None]))[0, :-1].detach() for s in samples]
    counted = [torch.from_numpy(s.counted)[1:] for s in samples]
    probabilities = torch.cat([torch.softmax(z[c], dim=-1) for z, c in zip(logits, counted, strict=True)])
    for k, mass in zip((1, 16, 128), masses, strict=True):
        assert mass == pytest.approx(probabilities.topk(k).values.sum(dim=1).mean().item(), abs=1e-5)


def test_an_interrupted_recording_goes_on(teacher, tmp_path):
    samples = random_samples(LENGTHS)
    whole = record_teacher(context_of(teacher, batch_tokens=12), samples, tmp_path / "whole", k=8)

    def stop(tokens):
        if len(list((tmp_path / "cut").glob("batch-*"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_teacher(context_of(teacher, batch_tokens=12, told=stop), samples, tmp_path / "cut", k=8)
    with pytest.raises(InputError, match="no finished recording"):
        OfflineTeacher.open(tmp_path / "cut", samples)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("batch-*")}
    assert record_teacher(context_of(teacher, batch_tokens=12), samples, tmp_path / "cut", k=8) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for path in (tmp_path / "whole").glob("batch-*"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_recording_does_not_go_on_in_other_batches(teacher, tmp_path):
    samples, batches = random_samples(LENGTHS), (28, 42)
    parts = [[batch.indices for batch in make_batches(samples, tokens)] for tokens in batches]
    assert len(parts[0]) == len(parts[1])
    assert parts[0] != parts[1]

    def stop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_teacher(context_of(teacher, batch_tokens=batches[0], told=stop), samples, tmp_path, k=8)
    with pytest.raises(OutputError, match="other settings"):
        record_teacher(context_of(teacher, batch_tokens=batches[1]), samples, tmp_path, k=8)


def test_wrong_recordings_are_refused(teacher, tmp_path):
    samples = random_samples(LENGTHS)
    record_teacher(context_of(teacher), samples, tmp_path / "a", k=8)
    with pytest.raises(InputError, match="recorded on other samples"):
        OfflineTeacher.open(tmp_path / "a", random_samples(LENGTHS, seed=1))
    with pytest.raises(OutputError, match="other settings"):
        record_teacher(context_of(teacher), samples, tmp_path / "a", k=9)
    for options in ({"k": 0}, {"k": VOCABULARY + 1}, {"temperature": 0.0}):
        with pytest.raises(InputError, match="expected k between"):
            record_teacher(context_of(teacher), samples, tmp_path / "b", **options)
    offline = OfflineTeacher.open(tmp_path / "a", samples)
    batch = make_batches(samples, 30)[0]
    with pytest.raises(InputError, match="no hidden states"):
        offline.lesson(batch.input_ids, batch.labels, batch.indices, (1,))
    (tmp_path / "a" / "batch-000000.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="is damaged"):
        OfflineTeacher.open(tmp_path / "a", samples)


@pytest.mark.parametrize("change", [{"shards": 0}, {"k": 3}, {"temperature": 0.0}, {"positions": "many"}])
def test_an_index_that_says_other_than_what_lies_beside_it_is_refused(teacher, tmp_path, change):
    samples = random_samples(LENGTHS)
    record_teacher(context_of(teacher), samples, tmp_path, k=8)
    index = json.loads((tmp_path / "teacher.json").read_text())
    del index["seal"]
    (tmp_path / "teacher.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(InputError, match=r"teacher\.json"):
        OfflineTeacher.open(tmp_path, samples)


def test_streams_are_those_after_the_blocks_asked_for(teacher):
    batch = make_batches(random_samples(LENGTHS), 100)[0]
    lesson = OnlineTeacher(teacher).lesson(batch.input_ids, batch.labels, batch.indices, (0, 2))
    assert set(lesson.streams) == {0, 2}
    seen = {}
    handle = teacher.blocks[2].module.register_forward_hook(lambda m, a, out: seen.update(out=first(out)))
    with torch.no_grad():
        teacher.hidden(batch.input_ids)
    handle.remove()
    assert torch.equal(lesson.streams[2], seen["out"])
    assert not lesson.streams[2].requires_grad


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_teachers_stay_near_the_original(precision, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (extra 'bitsandbytes')")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # its CPU kernel wants multiples of 32
    folder = str(tiny_folder(tmp_path, "llama", 2, **sizes))
    exact, quantised = load_teacher(folder), load_teacher(folder, precision)
    assert quantised.stack.model.is_quantized
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        expected, got = (t.stack.logits(t.stack.hidden(tokens)) for t in (exact, quantised))
    relative = float((got - expected).norm() / expected.norm())
    assert 0 < relative < {"int8": 0.05, "nf4": 0.35}[precision]
    teacher = OnlineTeacher(quantised.stack, precision=precision)
    samples = random_samples(LENGTHS)
    batch = make_batches(samples, 100)[0]
    targets = teacher.lesson(batch.input_ids, batch.labels, batch.indices, ()).targets
    hidden = exact.stack.hidden(batch.input_ids)
    loss = vocabulary_loss(exact.stack, hidden, batch.labels, targets)
    assert math.isfinite(loss.total.item())
    assert loss.total.item() > 0


def test_precisions_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a teacher precision"):
        load_teacher("anything", "int3")
    if importlib.util.find_spec("bitsandbytes") is not None:
        with pytest.raises(InputError, match="quantised already"):
            load_teacher(str(Path(tmp_path) / "model.gguf"), "nf4")
