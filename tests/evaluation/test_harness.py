"""lm-eval through excise gives what lm-eval alone gives."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.weights import HOW_TO_INSTALL, smollm2

from excise.errors import InputError, MissingExtraError
from excise.evaluation import harness
from excise.evaluation.evaluate import Plan, checkpoints, default_out, evaluate
from excise.evaluation.inputs import judged_identity
from excise.evaluation.scores import Scores
from excise.models.loading import load
from tests.tiny import tiny_folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'excise[eval]'")

DATA = Path(os.environ.get("EXCISE_DATA", "../shared/data")) / "lm_eval_tasks"
QUESTIONS = 14
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""
GROUP = """\
group: toys
task: [toy, toy_too]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks and a group of them."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    choices = ["yes", "no indeed", "perhaps, perhaps not"]
    rows = [{"question": f"Is {i} big?", "choices": choices, "answer": draw.randrange(3)} for i in range(QUESTIONS)]
    for name, part in {"toy": rows, "toy_too": rows[:5]}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in part))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (folder / "toys.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def manager(tasks):
    """The task manager without lm-eval's own 14,000 tasks, whose index takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), layers=3)


def alone(folder, task, manager, **options):
    """lm-eval called directly on the folder."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, log_samples=False, **options)


@pytest.mark.parametrize("options", [{}, {"limit": 6}, {"limit": 6, "apply_chat_template": True}], ids=str)
def test_equal_to_lm_eval_alone(folder, manager, options):
    expected = alone(folder, "toy", manager, **options)["results"]["toy"]
    loaded = load(str(folder))
    settings = harness.harness_settings(
        manager, "toy", None, options.get("limit"), bool(options.get("apply_chat_template"))
    )
    found = harness.benchmark(harness.harness_model(loaded), "toy", settings, manager, fingerprint="x")
    for name in ("acc", "acc_norm"):
        assert found.metrics[f"{name},none"].value == expected[f"{name},none"]
        assert found.metrics[f"{name},none"].stderr == pytest.approx(expected[f"{name}_stderr,none"])
    assert found.details["samples"] == options.get("limit", QUESTIONS)
    assert found.details["version"] == 3
    assert found.headline == "acc_norm,none"


def test_a_group_has_a_score_and_those_of_its_tasks(folder, manager):
    expected = alone(folder, "toys", manager)["results"]
    lm = harness.harness_model(load(str(folder)), "2")
    found = harness.benchmark(
        lm, "toys", harness.harness_settings(manager, "toys", None, None, False), manager, fingerprint="x"
    )
    assert found.score.value == expected["toys"]["acc,none"]
    assert found.details["subtasks"]["toy_too"]["acc,none"][0] == expected["toy_too"]["acc,none"]
    assert found.details["samples"] == QUESTIONS + 5


def test_what_is_known_is_not_measured_again(folder, manager, tmp_path):
    shown, plan = [], Plan(("toy", "toy_too"), limit=3)

    def announce(text):
        from contextlib import nullcontext

        shown.append(text)
        return nullcontext()

    out = tmp_path / "scores.json"
    evaluate([str(folder)], Plan(("toy",), limit=3), out, load, manager=manager, announce=announce)
    first = Scores.load(out)
    assert len(shown) == 1
    scores, hashes = evaluate([str(folder)], plan, out, load, manager=manager, announce=announce)
    assert [text.split(": ")[1] for text in shown] == ["toy", "toy_too"]
    assert scores.results[0] == first.results[0]
    assert hashes == {str(folder): judged_identity(load(str(folder)))}
    assert Scores.load(out) == scores
    evaluate([str(folder)], plan, out, load, manager=manager, announce=announce, again=True)
    assert len(shown) == 4


@pytest.mark.parametrize("what", ["toy.jsonl", "toy.yaml", "text.txt", "model"])
def test_what_was_edited_is_judged_again(folder, manager, tmp_path, tasks, what):
    own = shutil.copytree(folder, tmp_path / "model")
    (tasks / "text.txt").write_text("A stack of blocks loses a few of them and still speaks.")
    out, plan = tmp_path / "scores.json", Plan(("toy",), text=tasks / "text.txt", limit=8)
    changes = {
        "toy.jsonl": ('"answer": 0', '"answer": 1'),
        "toy.yaml": ("{{answer}}", "{{(answer + 1) % 3}}"),
        "text.txt": ("stack", "stick"),
    }

    def judge():
        scores, hashes = evaluate([str(own)], plan, out, load, manager=manager)
        return {r.name: r for r in scores.results if r.model == hashes[str(own)]}, len(scores.results)

    first = judge()
    assert judge() == first
    if what == "model":
        with (own / "model.safetensors").open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\xc8\x42")
        again = {"toy", "text.txt"}
    else:
        path, (old, new) = tasks / what, changes[what]
        kept = path.read_text()
        assert old in kept
        path.write_text(kept.replace(old, new))
        again = {what.replace(".yaml", "").replace(".jsonl", "")}
    try:
        results, number = judge()
    finally:
        if what != "model":
            path.write_text(kept)
    assert number == 2 + len(again)
    for name in ("toy", "text.txt"):
        assert (results[name].metrics != first[0][name].metrics) == (name in again)


def test_a_task_that_fails_is_named_and_what_came_before_is_kept(folder, manager, tmp_path, tasks):
    data = tasks / "toy_too.jsonl"
    kept = data.read_text()
    data.write_text("{broken")
    try:
        with pytest.raises(InputError, match="toy_too failed"):
            evaluate([str(folder)], Plan(("toy", "toy_too"), limit=2), tmp_path / "s.json", load, manager=manager)
    finally:
        data.write_text(kept)
    assert [result.name for result in Scores.load(tmp_path / "s.json").results] == ["toy"]


def test_names_of_sets_stand_for_their_tasks():
    assert harness.task_names("paper, toy") == (*harness.TASK_SETS["paper"], "toy")
    assert harness.task_names("") == ()


def test_mistakes_are_told_before_anything_is_loaded(tmp_path):
    def refuse(source):
        raise AssertionError("loaded a model")

    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(["model"], Plan(), tmp_path / "s.json", refuse)
    with pytest.raises(InputError, match="include-path"):
        harness.task_manager(("toy",), tmp_path / "absent")
    with pytest.raises(InputError, match="absent"):
        evaluate(["model"], Plan(text=tmp_path / "absent.txt"), tmp_path / "s.json", refuse)


def test_without_lm_eval_the_install_command_is_named(monkeypatch):
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'excise\[eval\]'"):
        harness.task_manager(("toy",))


def test_a_batch_size_is_a_number_or_auto(folder):
    with pytest.raises(InputError, match="batch-size"):
        harness.harness_model(load(str(folder)), "many")


def test_a_run_stands_for_its_checkpoint_and_its_original(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"model": "org/name", "checkpoint": "model"}))
    assert checkpoints([str(tmp_path), "other"], False) == [str(tmp_path / "model"), "other"]
    assert checkpoints([str(tmp_path)], True) == ["org/name", str(tmp_path / "model")]
    assert default_out([str(tmp_path), "other"]) == tmp_path / "scores.json"
    assert default_out(["other"]) == Path("scores.json")


@pytest.mark.slow
def test_every_name_of_the_sets_is_known_to_lm_eval_and_others_are_refused():
    harness.task_manager([task for tasks in harness.TASK_SETS.values() for task in tasks])
    with pytest.raises(InputError, match="no_such_task"):
        harness.task_manager(["no_such_task"])


@pytest.mark.slow
def test_two_processes_share_the_samples(folder, tasks, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    options = ["--tasks", "toy", "--include-path", str(tasks), "--out", str(tmp_path / "s.json"), "--json"]
    subprocess.run([*launch, "excise", "evaluate", str(folder), *options], check=True, capture_output=True, timeout=300)
    (found,) = Scores.load(tmp_path / "s.json").results
    loaded = load(str(folder))
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = harness.harness_settings(manager, "toy", None, None, False)
    one = harness.benchmark(harness.harness_model(loaded), "toy", settings, manager, fingerprint=found.model)
    assert found.details["samples"] == QUESTIONS
    assert {name: m.value for name, m in found.metrics.items()} == {name: m.value for name, m in one.metrics.items()}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.data
def test_a_real_model_on_a_real_benchmark(tmp_path):
    if smollm2() is None:
        pytest.skip(f"no real weights; {HOW_TO_INSTALL}")
    if not DATA.is_dir():
        pytest.skip(f"no tasks in {DATA}; set EXCISE_DATA to a folder that has lm_eval_tasks/")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(DATA), include_defaults=False)
    plan = Plan(("hellaswag_local",), limit=100)
    scores, _ = evaluate([str(smollm2())], plan, tmp_path / "scores.json", load, manager=manager)
    (result,) = scores.results
    assert result.details["samples"] == 100
    assert abs(result.score.value - 0.45) < 2 * result.score.stderr
