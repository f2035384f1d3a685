"""Elements of charts: escaped, and told apart."""

import pytest

from excise.drawing.style import SHAPES, series
from excise.drawing.svg import line, marker, moved, polyline, rectangle, svg, text

HOSTILE = "<b onload='x'>\"&"


@pytest.mark.parametrize(
    "made",
    [
        text(0, 0, HOSTILE),
        marker(0, 0, "s0", HOSTILE),
        rectangle(0, 0, 1, 1, "s0", HOSTILE),
        svg(1, 1, HOSTILE, []),
    ],
)
def test_everything_from_data_is_escaped(made):
    assert "<b" not in made
    assert "&lt;b onload=&#39;x&#39;&gt;&#34;&amp;" in made


def test_elements_say_where_they_are():
    assert line(0, 1, 2.04, 3, "grid") == '<line x1="0.0" y1="1.0" x2="2.0" y2="3.0" class="grid"/>'
    assert polyline([(0, 1), (2, 3.25)], "s1") == '<polyline points="0.0,1.0 2.0,3.2" class="curve stroke-s1"/>'
    assert moved(1, 2, [text(0, 0, "a")]).startswith('<g transform="translate(1.0 2.0)"><text ')


def test_shapes_differ():
    assert len({marker(7, 7, "s0", "", shape=k) for k in range(SHAPES)}) == SHAPES


def test_forty_series_differ_in_colour_or_shape():
    assert len({series(place) for place in range(40)}) == 40
    assert len({series(place)[0] for place in range(8)}) == 8
