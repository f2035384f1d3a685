"""What a score is kept under changes with whatever the score depends on, and with nothing else."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch

from excise.evaluation.inputs import judged_identity, task_identity
from excise.models.loading import load
from tests.tiny import tiny_folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'excise[eval]'")

COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_choice: ["yes", "no"]
"""
TOY = """\
include: common.yaml
task: toy
doc_to_text: !function texts.question
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
num_fewshot: 0
"""
OTHER = """\
include: common.yaml
task: other
tag: tagged
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""
INNER = "group: inner\ntask: [toy]\n"
OUTER = """\
group: outer
task:
  - inner
  - {task: other, num_fewshot: 2}
  - {group: within, task: [toy]}
aggregate_metric_list: [{metric: acc}]
"""
FILES = {
    "toy.yaml": TOY,
    "other.yaml": OTHER,
    "inner.yaml": INNER,
    "outer.yaml": OUTER,
    "texts.py": "from helper import mark\ndef question(doc):\n    return doc['question'] + mark\n",
    "helper.py": "mark = '?'\n",
    "README.md": "Nothing that counts.\n",
}


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "data" / "toy.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps({"question": "Big", "answer": 0}) + "\n")
    for name, text in {**FILES, "common.yaml": COMMON.format(data=data)}.items():
        (folder / name).write_text(text)
    return folder


def identity(folder, name="toy"):
    from lm_eval.tasks import TaskManager

    return task_identity(TaskManager(include_path=str(folder), include_defaults=False), name)


def replace(file, old, new):
    """Change a file, and leave its size and its time of modification as they were."""

    def change(folder):
        path = folder / file
        found, text = path.stat(), path.read_text()
        assert old in text
        assert len(old) == len(new)
        path.write_text(text.replace(old, new))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    return change


CHANGES = [
    ("toy", replace("toy.yaml", "acc", "f1_"), True),
    ("toy", replace("toy.yaml", "num_fewshot: 0", "num_fewshot: 3"), True),
    ("toy", replace("toy.yaml", "{{answer}}", "{{ANSWER}}"), True),
    ("toy", replace("common.yaml", '"no"', '"No"'), True),
    ("toy", replace("texts.py", "question'] +", "Question'] +"), True),
    ("toy", replace("helper.py", "?", "!"), True),
    ("toy", replace("../data/toy.jsonl", "Big", "Old"), True),
    ("toy", replace("README.md", "Nothing", "Nobody!"), False),
    ("toy", replace("other.yaml", "{{answer}}", "{{ANSWER}}"), False),
    ("other", replace("texts.py", "question'] +", "Question'] +"), False),  # it names no function
    ("inner", replace("toy.yaml", "{{answer}}", "{{ANSWER}}"), True),
    ("outer", replace("outer.yaml", "num_fewshot: 2", "num_fewshot: 1"), True),
    ("outer", replace("inner.yaml", "[toy]", "[foe]"), True),
    ("outer", replace("toy.yaml", "{{answer}}", "{{ANSWER}}"), True),
    ("outer", replace("other.yaml", "{{answer}}", "{{ANSWER}}"), True),
    ("outer", replace("helper.py", "?", "!"), True),
    ("outer", replace("../data/toy.jsonl", "Big", "Old"), True),
    ("tagged", replace("other.yaml", "{{answer}}", "{{ANSWER}}"), True),
]


@pytest.mark.parametrize(("name", "change", "counts"), CHANGES)
def test_a_task_is_its_config_its_code_and_its_data(tasks, name, change, counts):
    before = identity(tasks, name)
    assert identity(tasks, name) == before
    change(tasks)
    assert (identity(tasks, name) != before) == counts


def test_a_task_moved_to_another_folder_is_the_same(tasks, tmp_path):
    assert identity(shutil.copytree(tasks, tmp_path / "elsewhere"), "outer") == identity(tasks, "outer")


LOCAL = {
    "pattern": ("dataset_path: json\ndataset_kwargs: {{data_files: '{data}/*.jsonl'}}", "part.jsonl"),
    "list": ("dataset_path: json\ndataset_kwargs: {{data_files: {{test: ['{data}/part.jsonl']}}}}", "part.jsonl"),
    "folder": ("dataset_path: {data}", "part.jsonl"),
    "folder of the options": ("dataset_path: json\ndataset_kwargs: {{data_dir: {data}}}", "deep/part.jsonl"),
    "in a folder": ("dataset_path: json\ndataset_kwargs: {{data_dir: {data}, data_files: '*.jsonl'}}", "part.jsonl"),
}


@pytest.mark.parametrize("way", LOCAL)
def test_local_data_count_however_they_are_named(tmp_path, way):
    config, file = LOCAL[way]
    data, tasks = tmp_path / "data", tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "toy.yaml").write_text(f"task: toy\n{config.format(data=data)}\n")
    (data / file).parent.mkdir(parents=True)
    (data / file).write_text("{}")
    before = identity(tasks)
    (data / file).write_text("[]")
    changed = identity(tasks)
    assert changed != before
    (data / file).with_name("more.jsonl").write_text("{}")
    assert (identity(tasks) != changed) == (way != "list")


def test_task_files_are_read_when_asked_not_when_the_manager_was_made(tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    before = task_identity(manager, "outer")
    replace("common.yaml", '"no"', '"No"')(tasks)
    assert task_identity(manager, "outer") != before


# --- the model


@pytest.fixture
def loaded(tmp_path):
    return load(str(tiny_folder(tmp_path / "model", layers=2)))


def other_template(loaded):
    loaded.tokenizer.chat_template += "!"


def other_token(loaded):
    loaded.tokenizer.add_tokens(["<new>"])


def other_end(loaded):
    loaded.tokenizer.eos_token = "<|im_end|>"


def other_generation(loaded):
    loaded.stack.model.generation_config.eos_token_id = [2, 5]


def other_weight(loaded):
    with torch.no_grad():
        loaded.stack.model.get_output_embeddings().weight[0, 0] += 1


def use(loaded):
    loaded.tokenizer("a b c d e", truncation=True, max_length=2, padding="max_length")


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (other_template, True),
        (other_token, True),
        (other_end, True),
        (other_generation, True),
        (other_weight, True),
        (use, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_judged_model_is_all_it_brings_along(loaded, change, counts):
    before = judged_identity(loaded)
    assert judged_identity(load(loaded.source)) == before
    change(loaded)
    assert (judged_identity(loaded) != before) == counts


def test_a_tokenizer_saved_again_is_the_same(loaded, tmp_path):
    before = judged_identity(loaded)
    again = shutil.copytree(loaded.source, tmp_path / "again")
    copy.deepcopy(loaded.tokenizer).save_pretrained(again)
    assert judged_identity(load(str(again))) == before
