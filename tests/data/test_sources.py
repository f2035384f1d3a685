"""Every form of data is recognised, every broken one is named, and draws are uniform and reproducible."""

from __future__ import annotations

import codecs
import collections
import gzip
import json
import re

import pytest

from excise.data.sources import draw_rows, places_of
from excise.errors import InputError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".ndjson"])
def test_files_of_json_lines(tmp_path, suffix):
    data = write_lines(tmp_path / f"data{suffix}", [{"messages": CHAT}, {"text": "x"}])
    source = draw_rows(data, 10, seed=0)
    assert sorted(row.name for row in source.rows) == [f"data{suffix}:1", f"data{suffix}:2"]
    assert source.provenance["data"] == data
    assert len(source.provenance["sha256"]) == 64


def test_empty_lines_are_passed_over_but_counted(tmp_path):
    (tmp_path / "data.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    rows = draw_rows(str(tmp_path / "data.jsonl"), 10, seed=0).rows
    assert {row.name: row.text for row in rows} == {"data.jsonl:2": "a", "data.jsonl:4": "b"}


BAD_ROWS = {
    "cut": (b'{"text": "cut', "not a JSON object"),
    "list": (b"[1, 2]", "got list"),
    "not UTF-8": ('{"text": "caf\xe9"}'.encode("latin-1"), "not a JSON object"),
    "other fields": (b'{"question": "x", "answer": "y"}', r"expected .*`messages`.*got keys \['answer', 'question'\]"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "`text` holds half a surrogate pair"),
    "half a pair in a chat": (
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        "'content' of turn 1 of `messages` holds half a surrogate pair",
    ),
    "a number": (b'{"text": 17}', "`text` must be text, got int"),
    "null": (b'{"text": null}', "`text` is null"),
    "null response": (b'{"prompt": "Hi", "response": null}', "got keys"),
    "no content": (
        b'{"messages": [{"role": "user"}]}',
        r"turn 1 of .* needs 'content' or tool calls, got keys \['role'\]",
    ),
    "null content": (
        b'{"messages": [{"role": "user", "content": null}]}',
        "needs 'content' or tool calls, got 'content': null",
    ),
    "no turns": (b'{"messages": []}', "`messages` is empty"),
    "turn of text": (b'{"messages": ["Hi"]}', "turn 1 of `messages` must be an object, got str"),
    "turn of nothing": (b'{"conversations": [null]}', "must be an object, got NoneType"),
    "wrong keys": (b'{"conversations": [{"from": "human", "text": "Hi"}]}', "needs 'value' or tool calls, got keys"),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        "a part of type image_url",
    ),
    "deep": (b'{"text": ' + b"[" * 100_000, "not a JSON object"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_skipped_counted_and_named(tmp_path, kind):
    line, message = BAD_ROWS[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    source = draw_rows(str(path), 10, seed=0)
    assert [row.text for row in source.rows] == ["fine"]
    assert source.skipped.rows == 1
    assert re.match(r"data\.jsonl:2: .*" + message, source.skipped.first[0])
    path.write_bytes(line + b"\n")
    with pytest.raises(InputError, match=r"none of the 1 rows .*data\.jsonl:1: .*" + message):
        draw_rows(str(path), 10, seed=0)


RECORD = '{"text": "Größe"}'
ENCODED = {
    "plain": RECORD.encode(),
    "mark of UTF-8": codecs.BOM_UTF8 + RECORD.encode(),
    "UTF-16": RECORD.encode("utf-16"),
    "UTF-16 the other way": codecs.BOM_UTF16_BE + RECORD.encode("utf-16-be"),
    "UTF-32": RECORD.encode("utf-32"),
    "gzip": gzip.compress(RECORD.encode()),
    "gzip with a mark": gzip.compress(codecs.BOM_UTF8 + RECORD.encode()),
    "one list": b" [\n" + RECORD.encode() + b"\n]",
    "one list with a mark": codecs.BOM_UTF8 + b"[" + RECORD.encode() + b"]",
    "line ends of Windows": RECORD.encode() + b"\r\n",
}


@pytest.mark.parametrize("form", ENCODED)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_files_of_json_in_any_encoding(tmp_path, quiet_datasets, form, place):
    path = tmp_path / "set" / ("train.jsonl.gz" if "gzip" in form else "train.json")
    path.parent.mkdir()
    path.write_bytes(ENCODED[form])
    source = draw_rows(str(path if place == "file" else path.parent), 10, seed=0)
    assert [row.text for row in source.rows] == ["Größe"]
    assert not source.skipped.rows


@pytest.mark.parametrize("form", [name for name in ENCODED if "list" not in name])
def test_texts_in_any_encoding(tmp_path, form):
    path = tmp_path / "text.txt"
    path.write_bytes(ENCODED[form])
    (row,) = draw_rows(str(path), 10, seed=0).rows
    assert row.text.rstrip("\n") == RECORD


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.csv.gz", "data.parquet"])
def test_tables(tmp_path, quiet_datasets, name):
    path, columns = tmp_path / name, {"prompt": ["a,b", None, "c"], "response": ["d\ne", "x", "f"]}
    if name.endswith("parquet"):
        quiet_datasets.Dataset.from_dict(columns).to_parquet(path)
    else:
        separator = "\t" if "tsv" in name else ","
        text = "\ufeffprompt,response\n'a,b','d\ne'\n,x\nc,f\n".replace("'", '"')
        text = text.replace("prompt,", f"prompt{separator}").replace('b",', f'b"{separator}')
        content = text.replace("\n,x", f"\n{separator}x").replace("c,f", f"c{separator}f").encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = draw_rows(str(path), 10, seed=0)
    assert {tuple(turn["content"] for turn in row.messages) for row in source.rows} == {("a,b", "d\ne"), ("c", "f")}
    assert source.skipped.rows == 1


LISTS = {
    "a number among them": (b'[{"text": "one"},\n 3,\n {"text": "two"}]', [1], "expected a JSON object, got int"),
    "cut": (b'[{"text": "one"},\n{"text": "two"},\n{"text": "thr', [2], "the list is damaged here"),
    "cut before a comma": (b'[\n  {"text": "one"},\n  {"text": "two"}\n', [2], "the list is damaged here"),
    "not UTF-8": (b'[\n{"text": "one"},\n{"text": "caf\xe9"},\n{"text": "two"}\n]', [1], "half a surrogate pair"),
    "half a pair": (b'[{"text": "one"}, {"text": "\\udead"}, {"text": "two"}]', [1], "half a surrogate pair"),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_bad_row_of_a_list_is_skipped_counted_and_named(tmp_path, kind, mark):
    content, places, message = LISTS[kind]
    (tmp_path / "data.json").write_bytes(mark + content)
    source = draw_rows(str(tmp_path / "data.json"), 10, seed=0)
    assert {row.text for row in source.rows} == {"one", "two"}
    assert source.skipped.rows == len(places)
    assert source.skipped.first[0].startswith(f"data.json[{places[0]}]: ")
    assert message in source.skipped.first[0]


def test_a_folder_of_texts_with_a_mark(tmp_path, quiet_datasets):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.txt").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n")
    assert sorted(row.text for row in draw_rows(str(folder), 10, seed=0).rows) == ["one", "two"]


def test_files_that_are_not_text_are_refused(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, content in (
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


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_configuration_may_be_named(tmp_path, quiet_datasets, form):
    names = ("small", "large")
    for name in names:
        if form == "jsonl":
            write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
        else:
            quiet_datasets.Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / f"{name}.parquet")
    configurations = "".join(f"- config_name: {name}\n  data_files: {name}.{form}\n" for name in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    for data, text in (("large", "large"), ("small@train", "small")):
        source = draw_rows(f"{tmp_path}:{data}", 8, seed=0)
        assert [row.text for row in source.rows] == [text]
        assert source.provenance["configuration"] == text
    with pytest.raises(InputError, match=r"(?s)'large'.*Name one as '.*:CONFIGURATION'"):
        draw_rows(str(tmp_path), 8, seed=0)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path, quiet_datasets):
    write_lines(tmp_path / "test.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"it has the splits test; name one as"):
        draw_rows(str(tmp_path), 8, seed=0)
    assert len(draw_rows(f"{tmp_path}@test", 8, seed=0).rows) == 1


AWKWARD = ("a.jsonl", "b,c.txt", "d:0.5", "e.jsonl:2", "f,g:1,h.txt")


@pytest.mark.parametrize(
    ("data", "places"),
    [
        ("starter", [("starter", 1)]),
        ("a.jsonl", [("a.jsonl", 1)]),
        ("b,c.txt", [("b,c.txt", 1)]),
        ("d:0.5", [("d:0.5", 1)]),
        ("a.jsonl:0.5,b,c.txt:0.5", [("a.jsonl", 0.5), ("b,c.txt", 0.5)]),
        ("a.jsonl, b,c.txt", [("a.jsonl", 0.5), ("b,c.txt", 0.5)]),
        ("d:0.5:1,e.jsonl:2:3", [("d:0.5", 0.25), ("e.jsonl:2", 0.75)]),
        ("d:0.5,e.jsonl:2", [("d:0.5", 0.5), ("e.jsonl:2", 0.5)]),
        ("f,g:1,h.txt:3,starter:1", [("f,g:1,h.txt", 0.75), ("starter", 0.25)]),
        ("org/name:config@split", [("org/name:config@split", 1)]),
        ("org/name:2024", [("org/name:2024", 1)]),
        ("self=org/name:2024", [("self=org/name:2024", 1)]),
        ("folder:2024", [("folder:2024", 1)]),
        ("org/name:2024:1", [("org/name:2024", 1)]),
        ("starter:2", [("starter", 1)]),
        ("self:2", [("self", 1)]),
        ("a.jsonl:2", [("a.jsonl", 1)]),
        ("absent.jsonl:2", [("absent.jsonl", 1)]),
        ("org/name:2024@train,starter", [("org/name:2024@train", 0.5), ("starter", 0.5)]),
        ("org/name:20231101.en@train:2,org/other:6", [("org/name:20231101.en@train", 0.25), ("org/other", 0.75)]),
    ],
)
def test_sources_and_their_shares(tmp_path, monkeypatch, data, places):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in AWKWARD:
        (tmp_path / name).write_text("")
    assert [(place.data, place.share) for place in places_of(data)] == places


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("starter,", "without a name"),
        ("starter:0.5,org/name", "no share for org/name"),
        ("starter:0,org/name:1", "share of 0"),
        ("starter:1,starter:2", "twice"),
    ],
)
def test_sources_that_make_no_sense(data, message):
    with pytest.raises(InputError, match=message):
        places_of(data)


def further(source):
    return [int(row.text) for row in source.further]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder", "stream"])
def test_what_is_drawn_further_is_every_other_row_once(tmp_path, quiet_datasets, form):
    rows, folder = [{"text": str(i)} for i in range(50)], tmp_path / "set"
    folder.mkdir()
    if form in ("jsonl", "folder"):
        data = write_lines(folder / "train.jsonl", rows)
    else:
        data = str(folder / "train.parquet")
        quiet_datasets.Dataset.from_list(rows).to_parquet(data)
    place = data if form in ("jsonl", "parquet") else str(folder)
    source = draw_rows(place, 6, seed=0)
    first, others = [int(row.text) for row in source.rows], further(source)
    assert sorted(first + others) == list(range(50))
    assert others not in (sorted(others), sorted(others, reverse=True))
    assert further(draw_rows(place, 6, seed=0)) == others != further(draw_rows(place, 6, seed=1))
