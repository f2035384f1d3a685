"""Charts as files: whole in themselves, the same bytes from the same data."""

import pytest

from excise.drawing.chart import WIDTH, Chart, Drawing, Entry, require_svg, svg_file, write_chart, write_charts
from excise.drawing.svg import marker, text
from excise.errors import InputError
from tests.svg_files import SVG, Figure


def chart(label="Damage", entries=(), caption="", tip="one"):
    parts = [text(5, 5, "inside"), marker(9, 9, "s0", tip)]
    return Chart(label, lambda width: Drawing(100 + width, parts), entries, caption)


def test_a_file_holds_heading_legend_drawing_and_caption():
    figure = Figure(svg_file(chart(entries=(Entry("first", "s0", 0), Entry("second", "s1", 3)), caption="Read me.")))
    assert figure.title == "Damage"
    assert figure.texts == ["Damage", "first", "second", "inside", "Read me."]
    assert figure.tips == ["one"]
    assert len(figure.marked("fill-s1")) == 1
    assert float(figure.root.get("height")) > 100 + WIDTH


def test_long_labels_and_legends_take_lines_of_their_own():
    words = "what was measured against what had been said of it before " * 4
    entries = tuple(Entry(f"a method of a long name, {k}", "s0", 0) for k in range(9))
    figure = Figure(svg_file(chart(words, entries, words)))
    low, high = (float(Figure(svg_file(made)).root.get("height")) for made in (chart(), chart(words, entries, words)))
    assert len(figure.marked("heading")) > 1
    assert all(len(element.text) < 80 for element in figure.marked("heading"))
    assert " ".join(element.text for element in figure.marked("heading")) == words.strip()
    rows = {element.get("y") for element in figure.marked("name")}
    assert 2 <= len(rows) <= 5
    assert high > low + 100


def test_hostile_text_stays_text():
    hostile = "<script>alert('x')</script>\"&\x00\x1b\ud800\uffffé\U0001f600"
    figure = Figure(svg_file(chart(hostile, (Entry(hostile, "s0", 0),), hostile, hostile)))
    shown = "<script>alert('x')</script>\"&\ufffd\ufffd\ufffd\ufffdé\U0001f600"
    assert figure.title == shown
    assert figure.texts.count(shown) == 3
    assert figure.tips == [shown]
    assert not list(figure.root.iter(f"{SVG}script"))


def test_equal_charts_are_equal_bytes(tmp_path):
    for name in ("a.svg", "b.svg"):
        write_chart(chart(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes() == svg_file(chart()).encode()


def test_files_are_named_after_their_charts(tmp_path):
    names = write_charts({"damage": chart(), "cost": chart("Cost")}, tmp_path / "figures")
    assert names == {"damage": "figures/damage.svg", "cost": "figures/cost.svg"}
    assert Figure(tmp_path / names["cost"]).title == "Cost"


def test_another_suffix_is_refused(tmp_path):
    require_svg("a/b.SVG")
    with pytest.raises(InputError, match=r"written as \.svg, got .*curve\.png; name it curve\.svg"):
        write_chart(chart(), tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
