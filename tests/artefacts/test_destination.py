"""Nothing is lost that nobody agreed to lose, whoever writes."""

from __future__ import annotations

import os

import pytest

from excise.artefacts import require_free
from excise.errors import OutputError


def own_folder(path):
    path.mkdir()
    (path / "excise.json").write_text("{}")
    return path


def test_what_is_not_there_may_be_written(tmp_path):
    assert require_free(tmp_path / "new" / "deep", folder=True) == tmp_path / "new" / "deep"
    assert require_free(tmp_path / "new.json", folder=False, inputs=[tmp_path / "absent", "org/name"])
    (tmp_path / "empty").mkdir()
    assert require_free(tmp_path / "empty", folder=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("make", "folder", "message"),
    [
        (lambda p: p.mkdir() or (p / "thesis.txt").write_text("years"), True, "not written by excise"),
        (lambda p: p.write_text("a file"), True, "is a file; expected a folder"),
        (lambda p: p.mkdir(), False, "is a folder; expected a file"),
        (lambda p: own_folder(p), False, "is a folder; expected a file"),
        (lambda p: os.mkfifo(p), False, "a device, a pipe or a socket"),
        (lambda p: p.symlink_to("nowhere"), False, "is a link to .*nowhere, which does not exist"),
        (lambda p: p.symlink_to(p), False, "circle|does not exist"),
        (lambda p: p.symlink_to("/dev/null"), False, "a device, a pipe or a socket"),
    ],
)
def test_what_is_never_replaced(tmp_path, make, folder, message, force):
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        require_free(tmp_path / "out", folder=folder, force=force)


@pytest.mark.parametrize("folder", [False, True])
def test_results_are_replaced_on_demand_alone(tmp_path, folder):
    out = own_folder(tmp_path / "out") if folder else tmp_path / "out.json"
    if not folder:
        out.write_text("old")
    with pytest.raises(OutputError, match="--force"):
        require_free(out, folder=folder)
    assert require_free(out, folder=folder, force=True) == require_free(out, folder=folder, adds=True) == out


def test_what_is_read_is_never_written_to(tmp_path):
    model = own_folder(tmp_path / "models" / "one") if (tmp_path / "models").mkdir() is None else None
    (model / "config.json").write_text("{}")
    for out, folder, message in (
        (model, True, "is what is being read"),
        (tmp_path / "models", True, "holds .*one, which is being read"),
        (model / "config.json", False, "belongs to .*one, which is being read"),
    ):
        with pytest.raises(OutputError, match=message):
            require_free(out, folder=folder, inputs=[model], force=True)
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(OutputError, match="is what is being read"):
        require_free(tmp_path / "link", folder=True, inputs=[model], force=True)
    assert require_free(model / "new", folder=True, inputs=[model]) == model / "new"


def test_a_link_is_followed(tmp_path):
    place = own_folder(tmp_path / "place")
    (tmp_path / "link").symlink_to(place)
    assert require_free(tmp_path / "link", folder=True, force=True) == place


def test_a_file_on_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*: .*file is not a folder you may write to"):
        require_free(tmp_path / "file" / "out", folder=True)
