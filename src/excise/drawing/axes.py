"""Scales from values to pixels, their ticks, and the frame that both axes of a chart make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup

from excise.drawing.svg import line, text

# Width of a chart for large screens, and for phones, in pixels.
WIDE, NARROW = 1000, 343


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, with its ticks.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: pixel.
        end: pixel.
        logarithmic: whether the scale is.

    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, count: int = 5, *, integers: bool = False) -> list[float]:
        """Round values within the scale that part it into about `count`.

        Args:
            count: of the parts, at least 4; a linear scale has at most so many between its first tick and its last.
            integers: whole values only; without meaning for a logarithmic scale.

        Examples:
            >>> Axis(-0.3, 1.1, 0, 100).ticks(4)
            [0.0, 0.5, 1.0]
            >>> Axis(0.8, 125, 0, 100, logarithmic=True).ticks()
            [1.0, 3.0, 10.0, 30.0, 100.0]

        """
        return self._powers(count) if self.logarithmic else self._multiples(count, integers)

    def _multiples(self, count: int, integers: bool) -> list[float]:
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / count))
        if integers:
            power = max(power, 1.0)
        # None is more than twice the one before, so that four parts leave two ticks at least.
        sizes = (1, 2, 4, 5, 10) if integers else (1, 2, 2.5, 5, 10)
        # Values such as 0.3 / 0.1 lie beside the whole number they stand for.
        slack = 1e-9
        step = next(size * power for size in sizes if size * power * count >= span * (1 - slack))
        first, last = math.ceil(self.low / step - slack), math.floor(self.high / step + slack)
        return [float(f"{k * step:.12g}") for k in range(first, last + 1)]

    def _powers(self, count: int) -> list[float]:
        decades = math.log10(self.high / self.low)
        every = max(1, round(decades / count))
        digits = (1,) if decades > count else (1, 3) if decades > 1.5 else (1, 2, 5)
        exponents = range(
            math.floor(math.log10(self.low)) // every * every, math.ceil(math.log10(self.high)) + 1, every
        )
        found = (float(f"{digit}e{exponent}") for exponent in exponents for digit in digits)
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]


def axis(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """A scale over finite values with some room at both ends.

    Args:
        values: at least one that is finite.
        start: pixel of the low end.
        end: pixel of the high end.
        zero: whether 0 belongs to the scale.
        log: logarithmic, if all values are positive and they span more than a factor of 30.

    """
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 30:
        return Axis(low / 1.25, high * 1.25, start, end, logarithmic=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - (0 if zero and low == 0 else room), high + (0 if zero and high == 0 else room), start, end)


def number(value: float) -> str:
    """A tick's or a tooltip's number: four significant digits, a true minus sign."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def signed(value: float | None) -> str:
    """A difference in nats: its sign, a true minus among them, and three decimals; empty for None.

    Examples:
        >>> signed(0.0631), signed(-0.25)
        ('+0.063', '−0.250')

    """
    return "" if value is None else f"{value:+.3f}".replace("-", "−")


def row_frame(x: Axis, bottom: float, label: str) -> list[Markup]:
    """Grid, ticks and title of a horizontal axis below rows that have names instead of a scale."""
    parts = []
    for tick in x.ticks(_parts(x, 8)):
        parts += [line(x(tick), 4, x(tick), bottom, "grid"), text(x(tick), bottom + 19, number(tick))]
    return [*parts, text((x.start + x.end) / 2, bottom + 40, label, style="title")]


def frame(
    x: Axis, y: Axis, x_label: str, y_label: str, *, integers: bool = False, left: float | None = None
) -> list[Markup]:
    """Grid, ticks and titles of both axes.

    Args:
        x: horizontal scale.
        y: vertical scale.
        x_label: title of the horizontal axis.
        y_label: title of the vertical axis.
        integers: ticks of the horizontal axis at whole values only.
        left: pixel at which the grid begins, where something lies before the horizontal scale.

    """
    left = x.start if left is None else left
    parts = []
    for tick in y.ticks(_parts(x, 6)):
        parts += [
            line(left, y(tick), x.end, y(tick), "grid"),
            text(left - 8, y(tick) + 4, number(tick), anchor="end"),
        ]
    for tick in x.ticks(_parts(x, 8), integers=integers):
        parts += [line(x(tick), y.start, x(tick), y.start + 4, "axis"), text(x(tick), y.start + 19, number(tick))]
    parts.append(line(left, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 40, x_label, style="title"))
    parts.append(text(left, y.end - 12, y_label, anchor="start", style="title"))
    return parts


def _parts(x: Axis, many: int) -> int:
    return 4 if x.end - x.start < NARROW else many


@dataclass(frozen=True)
class Plane:
    """Both axes of a chart and the frame drawn around them; marks are added to `parts`.

    Attributes:
        x: horizontal scale.
        y: vertical scale.
        height: of the chart, pixels.
        parts: what is drawn so far.

    """

    x: Axis
    y: Axis
    height: float
    parts: list[Markup]


def plane(
    width: float,
    x_of: Callable[[float, float], Axis],
    y_of: Callable[[float, float], Axis],
    x_label: str,
    y_label: str,
    *,
    tall: float = 380,
    integers: bool = False,
) -> Plane:
    """The frame of a chart that fills a width.

    Args:
        width: pixels.
        x_of: horizontal scale, from its first and last pixel.
        y_of: vertical scale, likewise; it runs upwards.
        x_label: title of the horizontal axis.
        y_label: title of the vertical axis.
        tall: height where there is room, in pixels; 80 less on a narrow screen.
        integers: ticks of the horizontal axis at whole values only.

    """
    height = tall - 80 if width <= NARROW else tall
    x, y = x_of(58, width - 16), y_of(height - 52, 34)
    return Plane(x, y, height, frame(x, y, x_label, y_label, integers=integers))
