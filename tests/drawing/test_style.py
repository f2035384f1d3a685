"""One set of colours: following the reader's scheme in a page, plain in a file."""

import re

from excise.drawing.style import COLOURS, file_style, page_style


def test_a_page_has_both_schemes_and_a_file_the_light_one():
    page, file = page_style(), file_style()
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: {light};" in page
        assert f"--{name}: {dark};" in page
        if name != "bg":
            assert f".fill-{name} {{ fill: {light}; }}" in file
    assert "var(" not in file
    assert "#ffffff" in re.search(r"\.mark \{.*\}", file)[0]  # outlines in the colour behind them


def test_both_style_the_same_classes():
    classes = [re.findall(r"^(\.[\w-]+) \{", sheet, re.MULTILINE) for sheet in (page_style(), file_style())]
    assert classes[0] == classes[1]
    assert len(set(classes[0])) == len(classes[0])


def test_every_selector_is_one_class():
    for selector in re.findall(r"^(.*?) \{", file_style(), re.MULTILINE):
        assert re.fullmatch(r"\.[a-z0-9-]+", selector)
