"""What is printed of names and paths that come from anywhere."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.table import Table

from excise.cli import terminal
from excise.text import markdown_text, printable, spreadsheet_text

HOSTILE = ("[/x]", "[bold]x", ":tada:", "\x1b]0;title\x07", "a\rb", "\ud83d", "\u202egnp.exe")


@pytest.fixture
def shown(monkeypatch):
    """Print, as the verbs do, and return what came out."""

    def call(*printed):
        stream = io.StringIO()
        monkeypatch.setattr(terminal.output, "_file", stream)
        terminal.output.print(*printed)
        return stream.getvalue()

    return call


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_printed_as_they_stand_and_steer_nothing(text, shown):
    table = Table("name", title=text)
    table.add_row(text, style="bold")
    for printed in (text, table):
        said = shown(printed)
        assert printable(text) in said
        assert not set(said) & set("\x1b\x07\r\ud83d\u202e")


@pytest.mark.parametrize("text", HOSTILE)
def test_bars_and_status_lines_take_any_name(text, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(terminal.console, "_file", stream)
    with terminal.status(text), terminal.tokens_progress(text, 10) as advance:
        advance(10)
    assert "Traceback" not in stream.getvalue()
    assert "\ud83d" not in stream.getvalue()


def test_a_verb_ends_well_in_a_folder_whose_name_is_markup(excise, tmp_path):
    folder = tmp_path / "[" / "x]"
    folder.mkdir(parents=True)
    np.save(folder / "[bold].npy", np.eye(4))
    code, out, err = excise("solve", "--hessian", folder / "[bold].npy", "--remove", 1, "--out", folder / "[red].json")
    assert (code, err) == (0, "")
    assert "certified" in out
    assert (folder / "[red].json").is_file()


def test_an_error_names_its_file_without_what_steers_a_terminal(excise):
    code, _, err = excise("solve", "--hessian", "a\x1b[2J\ud83d.npy", "--remove", 1)
    assert code == 2
    assert "a\\x1b[2J\\ud83d.npy" in err


@pytest.mark.parametrize(
    ("text", "markdown", "cell"),
    [
        ("a_b-7B", "a_b-7B", "a_b-7B"),
        ("# x", "\\# x", "# x"),
        ("x\n\n# y", "x # y", "x # y"),
        ("a|b", "a\\|b", "a|b"),
        ("<script>", "\\<script\\>", "<script>"),
        ("[x](y)", "[x]\\(y)", "[x](y)"),
        ("=1+1", "\\=1+1", "'=1+1"),
        ("\t@SUM(A1)", "@SUM(A1)", "'@SUM(A1)"),
        ("-1.5e3", "\\-1.5e3", "-1.5e3"),
        ("-x", "\\-x", "'-x"),
    ],
)
def test_texts_begin_nothing_in_markdown_and_in_spreadsheets(text, markdown, cell):
    assert (markdown_text(text), spreadsheet_text(text)) == (markdown, cell)
