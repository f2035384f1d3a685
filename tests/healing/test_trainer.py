"""Training: what teacher = student leaves alone, falling losses, resumption, processes, and what stops it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from excise.errors import HealingError, InputError, MissingExtraError, OutputError
from excise.healing.checkpoints import MARK
from excise.healing.origin import Origin
from excise.healing.settings import PRESETS, Settings
from excise.healing.student import counterparts_of, cut_blocks, without_dropout
from excise.healing.teachers import OfflineTeacher, OnlineTeacher, record_teacher
from excise.healing.trackers import Tracking
from excise.healing.trainer import Watching, train
from excise.models.identity import model_identity
from excise.models.stack import find_stack
from excise.surgery.checkpoint import pruned
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

LENGTHS = (12, 9, 16, 10, 7, 14, 11, 13)
DENSE_AND_EXPERTS = ("gemma2", "gpt2", "mixtral")
HYBRIDS = {  # a block of four that can go: LFM2 and Qwen3-Next must keep their only full-attention block, 2
    "nemotron_h": 2,
    "lfm2": 1,
    "qwen3_next": 1,
    "falcon_h1": 2,
    "granitemoehybrid": 2,
}
SLOW_HYBRIDS = ("qwen3_next", "falcon_h1", "granitemoehybrid")
FAMILIES = [
    *DENSE_AND_EXPERTS,
    *(pytest.param(name, marks=pytest.mark.slow) if name in SLOW_HYBRIDS else name for name in HYBRIDS),
]
ORIGIN = Origin((0, 1, 3), 4)
QUICK = Settings(steps=6, learning_rate=3e-3, batch=4, micro_batch=2, warmup=0, save_every=100)


def teacher_and_student(model_type="llama"):
    """A model of four blocks and itself without one of them, block 2 if that can go."""
    teacher = find_stack(tiny_model(model_type, 4))
    with pruned(teacher, (HYBRIDS.get(model_type, 2),)) as model:
        student = copy.deepcopy(model)
    return OnlineTeacher(teacher), find_stack(student)


def changed(model, state):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def losses(curve):
    return [entry["loss"] for entry in curve]


def test_a_student_that_is_its_teacher_has_no_loss_and_does_not_change(tmp_path):
    teacher, student = (find_stack(tiny_model("gpt2", 3)) for _ in range(2))  # gpt2 has dropout
    state, before = copy_of(student.model), traces(student.model)
    settings = Settings(steps=3, batch=4, learning_rate=1e-2, weight_decay=0.0, hidden=1.0)
    curve = train(
        student, OnlineTeacher(teacher), random_samples(LENGTHS), tmp_path, settings, origin=Origin((0, 1, 2), 3)
    )
    assert losses(curve) == [0, 0, 0]
    assert changed(student.model, state) == set()
    assert traces(student.model) == before
    assert not student.model.training
    assert student.model.config.use_cache


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_loss_falls(model_type, tmp_path):
    teacher, student = teacher_and_student(model_type)
    curve = train(student, teacher, random_samples(LENGTHS), tmp_path, Settings(**{**vars(QUICK), "steps": 16}))
    first, last = losses(curve)[:2], losses(curve)[-2:]
    assert sum(last) < 0.8 * sum(first)


@pytest.mark.parametrize("train_what", ["all", "lora", "cuts", "refitted", "last"])
def test_a_trained_model_has_another_identity(train_what, tmp_path):
    teacher, student = teacher_and_student()
    before = model_identity(student.model)
    settings = Settings(**{**vars(QUICK), "steps": 2, "train": train_what})
    train(student, teacher, random_samples(LENGTHS), tmp_path, settings, origin=ORIGIN)
    assert model_identity(student.model) != before
    assert model_identity(student.model) == model_identity(copy.deepcopy(student.model))


def test_checkpointing_changes_nothing_and_really_recomputes(tmp_path):
    samples, curves, passes = random_samples(LENGTHS), {}, {}
    for checkpointing in (False, True):
        teacher, student = teacher_and_student()
        counted = []
        attention = student.blocks[1].sublayers[0].module
        attention.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        settings = Settings(**{**vars(QUICK), "steps": 3, "checkpointing": checkpointing})
        curves[checkpointing] = losses(train(student, teacher, samples, tmp_path / str(checkpointing), settings))
        passes[checkpointing] = len(counted)
        assert not student.model.is_activation_checkpointing
    assert curves[True] == pytest.approx(curves[False], rel=1e-6)
    assert passes[True] == 2 * passes[False] > 0


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32_weights(tmp_path):
    samples, curves, dtypes = random_samples(LENGTHS), {}, {}
    for precision in ("float32", "bf16-mixed"):
        teacher, student = teacher_and_student()
        seen = set()
        down = student.blocks[1].module.mlp.down_proj
        down.register_forward_hook(lambda m, a, output, seen=seen: seen.add(output.dtype))
        settings = Settings(**{**vars(QUICK), "steps": 4, "precision": precision})
        curves[precision] = losses(train(student, teacher, samples, tmp_path / precision, settings))
        dtypes[precision] = seen
        assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert dtypes == {"float32": {torch.float32}, "bf16-mixed": {torch.bfloat16}}
    assert curves["bf16-mixed"] == pytest.approx(curves["float32"], rel=0.05)
    assert curves["bf16-mixed"] != curves["float32"]


def test_tensorboard_gets_the_curve(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    teacher, student = teacher_and_student()
    settings = Settings(**{**vars(QUICK), "steps": 3})
    watching = Watching(tracking=Tracking(("tensorboard",), tmp_path / "board"))
    curve = train(student, teacher, random_samples(LENGTHS), tmp_path / "work", settings, watching=watching)
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    written = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert written == [(entry["step"], pytest.approx(entry["loss"], rel=1e-5)) for entry in curve]


class Noted(TrainerCallback):
    """A tracker that needs no package."""

    def __init__(self):
        self.losses = []
        NOTED.append(self)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])


NOTED = []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tracker_of_the_first_process_gets_the_curve(rank, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "noted", Noted)
    teacher, student = teacher_and_student()
    watching = Watching(tracking=Tracking(("noted",)))
    NOTED.clear()
    monkeypatch.setenv("RANK", str(rank))
    curve = train(
        student, teacher, random_samples(LENGTHS), tmp_path, Settings(**{**vars(QUICK), "steps": 2}), watching=watching
    )
    assert [tracker.losses for tracker in NOTED] == ([losses(curve)] if rank == 0 else [])


def test_trackers_that_cannot_be_had_are_refused():
    with pytest.raises(InputError, match=r"expected trackers among .*tensorboard.*wandb.*, got 'tensorbord'"):
        Tracking(("tensorbord",))
    missing = [name for name in ("wandb", "comet_ml", "neptune") if name not in get_available_reporting_integrations()]
    if missing:
        with pytest.raises(MissingExtraError, match=rf"reporting to {missing[0]} needs its package: .*pip install"):
            Tracking((missing[0],))


@pytest.mark.parametrize("kind", ["lora", "cuts", "refitted", "last"])
def test_only_some_weights_learn(kind, tmp_path):
    teacher, student = teacher_and_student()
    state, names = copy_of(student.model), [name for name, _ in student.model.named_parameters()]
    settings = Settings(**{**vars(QUICK), "train": kind, "cross_entropy": 0.1, "hidden": 0.1})
    curve = train(student, teacher, random_samples(LENGTHS), tmp_path, settings, origin=ORIGIN)
    assert sum(losses(curve)[-2:]) < sum(losses(curve)[:2])
    moved = changed(student.model, state)
    if kind == "cuts":
        assert moved == {name for name in names if ".layers.1." in name or ".layers.2." in name}
    elif kind == "refitted":
        downs = tuple(f"layers.{i}.mlp.down_proj.weight" for i in (1, 2))
        assert moved == {name for name in names if name.endswith(downs) or "norm" in name}
    elif kind == "last":
        last = [f".layers.{i}." for i in range(len(student.blocks) - 3, len(student.blocks))]
        assert moved == {name for name in names if any(part in name for part in (*last, "lm_head"))}
    else:
        assert moved == {name for name in names if "_proj" in name}
    assert [name for name, _ in student.model.named_parameters()] == names
    assert all(p.requires_grad for p in student.model.parameters())


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(kind, tmp_path):
    samples = random_samples(LENGTHS)
    settings = Settings(**{**vars(QUICK), "steps": 7, "save_every": 2, "train": kind, "cross_entropy": 0.3})
    teacher, student = teacher_and_student()
    expected = train(student, teacher, samples, tmp_path / "whole", settings)
    final = copy_of(student.model)

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    teacher, student = teacher_and_student()
    with pytest.raises(KeyboardInterrupt):
        train(student, teacher, samples, tmp_path / "cut", settings, watching=Watching(stop))
    (tmp_path / "cut" / "checkpoint-5").mkdir()  # as a kill amid writing leaves it
    teacher, student = teacher_and_student()
    seen = []
    counting = Watching(lambda progress: seen.append(progress.step))
    curve = train(student, teacher, samples, tmp_path / "cut", settings, watching=counting)
    assert seen == [5, 6, 7]
    assert losses(curve) == pytest.approx(losses(expected), abs=1e-6)
    assert all(torch.allclose(value, final[name], atol=1e-6) for name, value in student.model.state_dict().items())
    assert sorted(p.parent.name for p in (tmp_path / "cut").glob(f"*/{MARK}")) == ["checkpoint-6", "checkpoint-7"]
    _, student = teacher_and_student()
    again = train(student, teacher, samples, tmp_path / "cut", settings, watching=counting)
    assert seen == [5, 6, 7]  # a finished one is not trained further
    assert losses(again) == losses(curve)
    assert all(torch.allclose(value, final[name], atol=1e-6) for name, value in student.model.state_dict().items())


def test_a_training_stopped_on_purpose_goes_on_as_if_it_had_not(tmp_path):
    samples = random_samples(LENGTHS)
    teacher, student = teacher_and_student()
    expected = train(student, teacher, samples, tmp_path / "whole", QUICK)
    teacher, student = teacher_and_student()
    assert len(train(student, teacher, samples, tmp_path / "parts", QUICK, until=2)) == 2
    _, student = teacher_and_student()
    assert losses(train(student, teacher, samples, tmp_path / "parts", QUICK)) == pytest.approx(losses(expected))


def test_a_recorded_teacher_teaches_the_same(tmp_path):
    samples = random_samples(LENGTHS)
    teacher, student = teacher_and_student()
    record_teacher(context_of(teacher.stack), samples, tmp_path / "recorded", k=288)
    expected = train(student, teacher, samples, tmp_path / "a", QUICK)
    _, student = teacher_and_student()
    got = train(student, OfflineTeacher.open(tmp_path / "recorded", samples), samples, tmp_path / "b", QUICK)
    assert losses(got) == pytest.approx(losses(expected), rel=1e-3)


def test_accumulation_and_micro_batches_change_nothing(tmp_path):
    samples = random_samples(LENGTHS)
    curves = []
    for micro in (1, 4):
        teacher, student = teacher_and_student()
        settings = Settings(**{**vars(QUICK), "steps": 3, "micro_batch": micro})
        curves.append(losses(train(student, teacher, samples, tmp_path / str(micro), settings)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path):
    curves = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        script = Path(__file__).with_name("train_tiny.py")
        subprocess.run([*command, str(script), str(out)], env=environment, check=True, timeout=500)
        curves[processes] = json.loads((out / "result.json").read_text())
    assert curves[2]["losses"] == pytest.approx(curves[1]["losses"], rel=1e-5)
    assert curves[2]["norm"] == pytest.approx(curves[1]["norm"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_the_last_checkpoint(tmp_path):
    teacher, student = teacher_and_student()
    settings = Settings(**{**vars(QUICK), "save_every": 2})

    def break_it(progress):
        if progress.step == 3:
            with torch.no_grad():
                student.blocks[1].module.mlp.down_proj.weight.fill_(float("nan"))

    with pytest.raises(HealingError, match=r"loss became nan.*last good checkpoint is .*checkpoint-2"):
        train(student, teacher, random_samples(LENGTHS), tmp_path, settings, watching=Watching(break_it))
    assert not any("nan" in path.read_text() for path in tmp_path.glob("checkpoint-2/trainer_state.json"))


def test_a_checkpoint_that_cannot_be_written_stops_and_says_so(tmp_path):
    teacher, student = teacher_and_student()
    settings = Settings(**{**vars(QUICK), "save_every": 2})

    def block_it(progress):
        if progress.step == 3:
            (tmp_path / "checkpoint-4").write_text("a file where the folder should go")

    with pytest.raises(HealingError, match=r"could not be written.*checkpoint-2"):
        train(student, teacher, random_samples(LENGTHS), tmp_path, settings, watching=Watching(block_it))


def test_what_does_not_fit_together_is_refused(tmp_path):
    teacher, student = teacher_and_student()
    samples = random_samples(LENGTHS)
    record_teacher(context_of(teacher.stack), samples, tmp_path / "recorded", k=4)
    offline = OfflineTeacher.open(tmp_path / "recorded", samples)
    for said, options, origin, message in (
        (offline, {"hidden": 1.0}, ORIGIN, "no hidden states"),
        (teacher, {"hidden": 1.0}, None, "needs to know which"),
        (teacher, {"temperature": 2.0}, None, "temperature is 1, that of the settings 2"),
        (teacher, {"train": "cuts"}, None, "needs to know the cuts"),
        (teacher, {}, Origin((0, 1), 4), "names 2 blocks, the student has 3"),
        (teacher, {"batch": 9}, None, "at least one batch of 9 samples"),
    ):
        with pytest.raises(InputError, match=message):
            train(student, said, samples, tmp_path / "work", Settings(**{**vars(QUICK), **options}), origin=origin)
    train(student, teacher, samples, tmp_path / "other", Settings(**{**vars(QUICK), "steps": 1}))
    with pytest.raises(OutputError, match="other settings"):
        train(student, teacher, samples, tmp_path / "other", Settings(**{**vars(QUICK), "steps": 2}))


def test_settings_out_of_range_are_refused():
    for options in ({"learning_rate": 0.0}, {"steps": 0}, {"batch": -1}, {"hidden": -0.1}, {"clip": float("nan")}):
        with pytest.raises(InputError, match=next(iter(options))):
            Settings(**options)
    with pytest.raises(InputError, match="expected --train in"):
        Settings(train="some")


def test_presets_are_the_papers_runs():
    for name, rate, batch, epochs in (("paper-llama", 2e-5, 64, 1.0), ("paper-qwen", 1e-4, 16, 0.5)):
        preset = PRESETS[name]
        s = preset.settings
        assert (s.learning_rate, s.batch, s.epochs) == (rate, batch, epochs)
        assert (s.temperature, s.cross_entropy, s.hidden, s.train) == (1.0, 0.0, 0.0, "all")
        assert (s.warmup, s.weight_decay, s.clip, s.seed) == (100, 1e-4, 1.0, 42)
        assert (preset.data, preset.tokens, preset.held_out, preset.teacher) == (
            "teknium/OpenHermes-2.5", 1024, 0.01, "nf4",
        )  # fmt: skip


def test_places_of_the_student_in_the_original():
    assert counterparts_of([0, 1, 4, 5], 7) == (0, 3, 4, 6)
    assert cut_blocks([0, 1, 4, 5], 7) == (1, 2, 3)
    assert cut_blocks([2, 3], 4) == (0,)
    assert cut_blocks([0, 1], 2) == ()
    assert Origin.of({"original_blocks": [0, 2], "removed": [1]}) == Origin((0, 2), 3)
    assert Origin.of({}) is None


def test_dropout_is_off_for_the_while():
    model = tiny_model("gpt2", 2).train()
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert any(rates)
    tokens = torch.arange(8).unsqueeze(0)
    with without_dropout(model):
        assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == rates
