"""A teacher is what the student was made from, or it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from excise.context import Context
from excise.errors import InputError
from excise.healing.origin import Origin, origin_of
from excise.healing.teachers import OfflineTeacher, OnlineTeacher, record_teacher
from excise.models.loading import load
from excise.surgery.on_disk import prune_folder
from tests.gguf_files import write_gguf
from tests.random_samples import random_samples
from tests.tiny import tiny_folder, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("origin")
    tiny_folder(place / "first", "llama", layers=6)
    prune_folder(place / "first", [1, 4], place / "once")
    prune_folder(place / "once", [2], place / "twice")
    prune_folder(place / "first", [2, 3], place / "another branch")
    prune_folder(place / "another branch", [], place / "another branch, written anew")
    tiny_folder(place / "deeper", "llama", layers=8)
    tiny_folder(place / "as deep as once", "llama", layers=4)
    tiny_folder(place / "wider", "llama", layers=6, hidden_size=64)
    tiny_folder(place / "of another type", "mistral", layers=6)
    write_gguf(tiny_model("llama", 6), place / "first.gguf")
    return place


# Teacher of a model pruned twice, of whose blocks by the first original 0, 2 and 5 are left → which of its own these
# are, or why it is refused.
TEACHERS = {
    "first": Origin((0, 2, 5), 6),
    "first.gguf": Origin((0, 2, 5), 6),
    "once": Origin((0, 1, 3), 4),
    "twice": Origin((0, 1, 2), 3),
    "another branch": "lacks block 2 of the original",
    "another branch, written anew": "lacks block 2 of the original",
    "deeper": "an original of 6 blocks, and the teacher has 8",
    "as deep as once": "an original of 6 blocks, and the teacher has 4",
    "wider": "the teacher's width is 64, the student's",
    "of another type": "the teacher's model type is mistral, the student's llama",
}


@pytest.mark.parametrize("kind", ["online", "recorded"])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_explained_or_refused(name, kind, folders, tmp_path):
    student, loaded = load(str(folders / "twice")), load(str(folders / name), reading=False)
    teacher = OnlineTeacher(loaded.stack)
    if kind == "recorded":
        samples = random_samples([8, 8])
        record_teacher(Context(loaded), samples, tmp_path / "teacher", k=4)
        teacher = OfflineTeacher.open(tmp_path / "teacher", samples)
    expected = TEACHERS[name]
    if isinstance(expected, Origin):
        assert origin_of(student, teacher) == expected
    else:
        with pytest.raises(InputError, match=expected):
            origin_of(student, teacher)


def test_without_a_recipe_any_teacher_may_teach_and_nothing_is_known_of_blocks(folders):
    student, teacher = load(str(folders / "as deep as once")), load(str(folders / "deeper"))
    assert origin_of(student, OnlineTeacher(teacher.stack)) is None


def test_the_recipe_of_a_hub_id_lies_in_the_hubs_cache(folders):
    student = replace(load(str(folders / "once")), source="org/once")
    teacher = OnlineTeacher(load(str(folders / "first")).stack)
    assert origin_of(student, teacher) == Origin((0, 2, 3, 5), 6)


def test_the_verb_refuses_a_wrong_teacher_before_it_is_recorded(folders, excise, tmp_path):
    arguments = ("--samples", 30, "--tokens", 24, "--steps", 2, "--batch", 4)
    student, offline = folders / "twice", tmp_path / "teacher"
    for teacher, options in (("deeper", ()), ("deeper", ("--offline", offline)), ("another branch", ("--hidden", 0.1))):
        code, _, err = excise(
            "heal", student, "--teacher", folders / teacher, "--out", tmp_path / "out", *arguments, *options
        )
        assert (code, "the teacher" in err) == (2, True)
    assert not offline.exists()
