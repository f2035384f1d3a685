"""Scales and ticks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.drawing.axes import NARROW, Axis, axis, frame, number, plane


def test_a_linear_axis_maps_its_ends_and_leaves_room():
    scale = axis([2.0, 4.0], 100, 300)
    assert scale(scale.low) == 100
    assert scale(scale.high) == 300
    assert 100 < scale(2.0) < scale(4.0) < 300
    assert scale(3.0) == pytest.approx(200)
    assert axis([5.0], 0, 1)(5.0) == pytest.approx(0.5)
    assert axis([math.inf, 1.0, 2.0], 0, 1).high < 3


def test_a_logarithmic_axis_is_taken_where_it_helps():
    assert not axis([1.0, 20.0], 0, 1, log=True).logarithmic
    assert not axis([-1.0, 100.0], 0, 1, log=True).logarithmic
    scale = axis([1.0, 100.0], 0, 100, log=True)
    assert scale(10.0) == pytest.approx(50)
    assert scale(0.0) == 0  # below the scale: at its end


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (-0.3, 1.1, 4, [0, 0.5, 1]),
        (-7.5, -1, 4, [-6, -4, -2]),
        (0.0001, 0.00035, 5, [0.0001, 0.00015, 0.0002, 0.00025, 0.0003, 0.00035]),
        (0, 41_000, 4, [0, 20_000, 40_000]),
        (999.5, 1000.5, 5, [999.6, 999.8, 1000, 1000.2, 1000.4]),
    ],
)
def test_ticks_of_a_linear_scale(low, high, count, expected):
    assert Axis(low, high, 0, 100).ticks(count) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.94, 3.06, [2, 3]), (0, 9.3, [0, 2, 4, 6, 8]), (-3, 44, [0, 10, 20, 30, 40])]
)
def test_whole_ticks(low, high, expected):
    assert Axis(low, high, 0, 100).ticks(8 if high < 9 else 5, integers=True) == expected


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (1.5, 45, 5, [2, 5, 10, 20]),
        (0.8, 125, 5, [1, 3, 10, 30, 100]),
        (0.9, 1.1e6, 8, [x * 10**k for k in range(6) for x in (1, 3)] + [1e6]),
        (0.9, 1.1e6, 4, [1, 100, 10_000, 1e6]),
        (2e-7, 3e-5, 5, [3e-7, 1e-6, 3e-6, 1e-5, 3e-5]),
        (1e-30, 1, 5, [1e-30, 1e-24, 1e-18, 1e-12, 1e-6, 1]),
    ],
)
def test_ticks_of_a_logarithmic_scale(low, high, count, expected):
    assert Axis(low, high, 0, 100, logarithmic=True).ticks(count) == pytest.approx(expected, rel=1e-12)


@given(low=st.floats(-1e4, 1e4), span=st.floats(1e-2, 1e7), count=st.integers(4, 10), integers=st.booleans())
def test_linear_ticks_are_even_round_within_and_about_as_many_as_asked(low, span, count, integers):
    high = low + span
    ticks = Axis(low, high, 0, 100).ticks(count, integers=integers)
    slack = 1e-6 * span
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= count + 1
    if not integers or span >= 2:
        assert len(ticks) >= 2
        step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
        np.testing.assert_allclose(ticks, ticks[0] + step * np.arange(len(ticks)), atol=slack)
        np.testing.assert_allclose(np.rint(np.divide(ticks, step)) * step, ticks, atol=slack)
        sizes = [size * 10**power for size in ((1, 2, 4, 5) if integers else (1, 2, 2.5, 5)) for power in range(-5, 8)]
        assert min(abs(step / size - 1) for size in sizes) < 1e-6
    if integers:
        assert all(tick == int(tick) for tick in ticks)


@given(low=st.floats(1e-12, 1e6), factor=st.floats(30, 1e18), count=st.integers(4, 8))
def test_logarithmic_ticks_rise_within(low, factor, count):
    high = low * factor
    ticks = Axis(low, high, 0, 100, logarithmic=True).ticks(count)
    assert ticks == sorted(set(ticks))
    assert all(low * 0.998 <= tick <= high * 1.002 for tick in ticks)
    assert 1 <= len(ticks) <= 2 * count + 1


def test_numbers_are_short():
    assert [number(x) for x in (0.0, -1.5, 1234.5, 0.000012345, 1e9)] == ["0", "−1.5", "1,234", "1.234e−05", "1e+09"]


def test_a_narrow_frame_has_fewer_ticks():
    wide, narrow = (frame(Axis(0, 100, 50, end), Axis(0, 1, 200, 30), "x", "y") for end in (900, 300))
    assert len(narrow) < len(wide)


def test_a_plane_leaves_its_scales_inside():
    for width, height in ((1000, 380), (NARROW, 300)):
        on = plane(width, lambda a, b: Axis(0, 1, a, b), lambda a, b: Axis(0, 1, a, b), "x", "y")
        assert on.height == height
        assert 0 < on.x(0) < on.x(1) < width
        assert 0 < on.y(1) < on.y(0) < height
