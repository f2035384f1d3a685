"""Scales, ticks and escaping of the page's charts."""

import math

import pytest

from excise.report.sections.damage import _damage_axis
from excise.report.svg import axis, marker, number, table, text


def test_a_linear_axis_maps_its_ends_and_leaves_room():
    scale = axis([2.0, 4.0], 100, 300)
    assert scale(scale.low) == 100
    assert scale(scale.high) == 300
    assert 100 < scale(2.0) < scale(4.0) < 300
    assert scale(3.0) == pytest.approx(200)


def test_a_logarithmic_axis_is_taken_where_it_helps():
    assert not axis([1.0, 20.0], 0, 1, log=True).logarithmic
    assert not axis([-1.0, 100.0], 0, 1, log=True).logarithmic
    scale = axis([1.0, 100.0], 0, 100, log=True)
    assert scale(10.0) == pytest.approx(50)
    assert scale(0.0) == 0  # below the scale: at its end
    assert {1.0, 10.0, 100.0} <= set(scale.ticks())


def test_ticks_lie_within_and_may_be_whole():
    scale = axis([0.0, 9.3], 0, 100, zero=True)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert axis([2, 3], 0, 1).ticks(8, integers=True) == [2.0, 3.0]
    assert axis([5.0], 0, 1)(5.0) == pytest.approx(0.5)
    assert axis([math.inf, 1.0, 2.0], 0, 1).high < 3


def test_damages_of_different_size_share_a_logarithmic_axis():
    rows = [{"delta": 0.1, "interval": [-0.1, 0.2]}, {"delta": 9.0, "interval": [8.0, 10.0]}]
    scale = _damage_axis(rows, 0, 100)
    assert scale.logarithmic
    assert scale(-0.1) == 0
    assert not _damage_axis([{"delta": -0.1}, {"delta": 9.0}], 0, 100).logarithmic


def test_numbers_are_short():
    assert [number(x) for x in (0.0, -1.5, 1234.5, 0.000012345, 1e9)] == ["0", "−1.5", "1,234", "1.234e−05", "1e+09"]


def test_everything_from_data_is_escaped():
    hostile = "<b onload='x'>\"&"
    for made in (text(0, 0, hostile), marker(0, 0, "s0", hostile), table(("a",), [(hostile,)], hostile)):
        assert "<b" not in made
        assert "&lt;b onload=&#39;x&#39;&gt;&#34;&amp;" in made
