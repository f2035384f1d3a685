"""Every form of data is recognised, every broken one is named, and draws are uniform and reproducible."""

from __future__ import annotations

import collections
import gzip
import json

import pytest

from excise.data.sources import draw_rows, row_of
from excise.errors import InputError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FORMS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "conversations": {"conversations": CHAT},
    "prompt and response": {"prompt": "Hi", "response": "Hello"},
}


def write_lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_chat_is_recognised(form):
    row = row_of({**FORMS[form], "category": "code", "id": 7}, "a:1")
    assert list(row.messages) == CHAT
    assert row.text is None
    assert row.category == "code"
    assert row.name == "a:1"


def test_text_is_recognised():
    row = row_of({"text": "Once upon a time", "meta": {}}, "a:1")
    assert row.text == "Once upon a time"
    assert row.messages is None
    assert row.category is None


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".ndjson"])
def test_files_of_json_lines(tmp_path, suffix):
    data = write_lines(tmp_path / f"data{suffix}", [FORMS["messages"], {"text": "x"}])
    source = draw_rows(data, 10, seed=0)
    assert sorted(row.name for row in source.rows) == [f"data{suffix}:1", f"data{suffix}:2"]
    assert source.provenance["data"] == data
    assert len(source.provenance["sha256"]) == 64


def test_empty_lines_are_passed_over_but_counted(tmp_path):
    (tmp_path / "data.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    rows = draw_rows(str(tmp_path / "data.jsonl"), 10, seed=0).rows
    assert {row.name: row.text for row in rows} == {"data.jsonl:2": "a", "data.jsonl:4": "b"}


def test_fields_of_no_known_form_are_named(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"text": "a"}, {"question": "x", "answer": "y"}])
    with pytest.raises(InputError, match=r"data\.jsonl:2: expected .*`messages`.*got keys \['answer', 'question'\]"):
        draw_rows(data, 10, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not a JSON object"),
        ("[1, 2]", "got list"),
        ('{"messages": [{"role": "user"}]}', r"'role' and 'content', got \['role'\]"),
        ('{"messages": ["Hi"]}', "got str"),
        ('{"conversations": [{"from": "human", "text": "Hi"}]}', "'from' and 'value'"),
        ('{"conversations": [null]}', "got NoneType"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "needs text fields"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"data\.jsonl:2: .*" + message):
        draw_rows(str(tmp_path / "data.jsonl"), 10, seed=0)


def test_files_that_are_not_text_are_refused(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, content in (
        ("latin.jsonl", '{"text": "caf\xe9"}'.encode("latin-1")),
        ("latin.txt", "caf\xe9".encode("latin-1")),
        ("not.jsonl.gz", b'{"text": "plain, not gzip"}'),
        ("not.txt.gz", b"plain, not gzip"),
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("cut.txt.gz", whole[: len(whole) // 2]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            draw_rows(str(tmp_path / name), 10, seed=0)


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "book.txt").write_text("Once\nupon")
    assert [row.text for row in draw_rows(str(tmp_path / "book.txt"), 10, seed=0).rows] == ["Once\nupon"]
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"Once\nmore"))
    assert [row.text for row in draw_rows(str(tmp_path / "book.txt.gz"), 10, seed=0).rows] == ["Once\nmore"]


def test_a_file_that_is_not_there(tmp_path):
    for data in (str(tmp_path / "absent.jsonl"), "absent.jsonl", "./absent"):
        with pytest.raises(InputError, match="no data file"):
            draw_rows(data, 10, seed=0)


def test_a_seed_fixes_the_draw_and_its_order(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"text": str(i)} for i in range(100)])
    first, again, other = (draw_rows(data, 20, seed).rows for seed in (3, 3, 4))
    assert first == again
    assert {row.text for row in first} != {row.text for row in other}
    assert len({row.text for row in first}) == 20
    whole = draw_rows(data, 1000, seed=3).rows
    assert sorted(int(row.text) for row in whole) == list(range(100))
    assert [int(row.text) for row in whole] != list(range(100))


def test_draws_are_uniform_over_rows_and_places(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"text": str(i)} for i in range(12)])
    draws = [[int(row.text) for row in draw_rows(data, 4, seed).rows] for seed in range(600)]
    drawn = collections.Counter(i for draw in draws for i in draw)
    first = collections.Counter(draw[0] for draw in draws)
    # 600 draws: 200 ± 11.5 each over rows, 50 ± 6.8 each over first places; five standard deviations
    assert all(142 <= drawn[i] <= 258 for i in range(12))
    assert all(16 <= first[i] <= 84 for i in range(12))


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_a_folder_is_read_through_datasets(tmp_path, quiet_datasets):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"messages": CHAT, "category": str(i)} for i in range(30)])
    source = draw_rows(str(folder), 8, seed=1)
    assert len(source.rows) == 8
    assert all(list(row.messages) == CHAT for row in source.rows)
    assert len({row.category for row in source.rows}) == 8
    assert source == draw_rows(str(folder), 8, seed=1)
    assert source.rows != draw_rows(str(folder), 8, seed=2).rows
    assert source.provenance["split"] == "train"


def test_a_split_may_be_named(tmp_path, quiet_datasets):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        quiet_datasets.Dataset.from_dict({"text": [split] * 3}).to_parquet(folder / f"{split}-0.parquet")
    assert {row.text for row in draw_rows(f"{folder}@test", 8, seed=0).rows} == {"test"}
    with pytest.raises(InputError, match=r"cannot read data set .*split 'nonesuch'"):
        draw_rows(f"{folder}@nonesuch", 8, seed=0)
