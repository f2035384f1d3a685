"""Rows of the panel: a figure of the original beside those of its results, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from excise.artefacts import as_number
from excise.evaluation.intervals import Interval, paired_difference, quantiles, resampled, wilson

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# A rate that an interval may reach down to, and still the model would be said to be unable.
ABOUT_ZERO = 0.05
# Null stands in JSON for a figure that was not finite.
Number = Annotated[float, BeforeValidator(as_number)]


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval."""

    value: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Row:
    """One line of the panel.

    Attributes:
        group: "capabilities", "health" or "agreement".
        name: what is measured.
        variant: part of it: a context length, a domain; empty for all.
        unit: "share", "tokens" or "nats".
        higher_is_better: direction; None where neither is.
        samples: questions.
        figures: [models], the original's first; None for the original where it is compared with itself.
        differences: [models − 1], of each result less the original, on the same questions; empty where a figure is
            itself a comparison.
        chance: share of the original's answers to other questions that pass; None where that says nothing.
        note: what a reader must know.

    """

    group: str
    name: str
    variant: str
    unit: str
    higher_is_better: bool | None
    samples: int
    figures: tuple[Figure | None, ...]
    differences: tuple[Figure, ...] = ()
    chance: float | None = None
    note: str = ""

    def verdict(self, result: int) -> str:
        """Whether a result is better or worse than the original beyond chance: "better", "worse", or empty."""
        if self.higher_is_better is None or not self.differences:
            return ""
        difference = self.differences[result]
        # Of a figure that is no number nothing is said.
        if not (difference.low > 0 or difference.high < 0):
            return ""
        return "better" if (difference.low > 0) == self.higher_is_better else "worse"


def rates(name: str, variant: str, passed: Sequence[Bools], chance: float | None = None) -> Row:
    """A row of capabilities: rates of answers that pass.

    Args:
        name: what is measured.
        variant: part of it.
        passed: [models][questions], the original's first.
        chance: see `Row`.

    """
    figures, differences = _rates(passed)
    note = _unable(figures[0].low, chance)
    return Row("capabilities", name, variant, "share", True, len(passed[0]), figures, differences, chance, note)


def habits(name: str, shown: Sequence[Bools]) -> Row:
    """A row of health: rates of what is neither good nor bad, but for being another than the original's.

    Args:
        name: what is measured.
        shown: [models][questions], the original's first.

    """
    return Row("health", name, "", "share", None, len(shown[0]), *_rates(shown))


def _rates(passed: Sequence[Bools]) -> tuple[tuple[Figure, ...], tuple[Figure, ...]]:
    """Rates, and their differences from the first."""
    first, *others = passed
    figures = tuple(_figure(float(p.mean()), wilson(int(p.sum()), len(p))) for p in passed)
    differences = tuple(_figure(float(p.mean()) - float(first.mean()), paired_difference(p, first)) for p in others)
    return figures, differences


def _unable(low: float, chance: float | None) -> str:
    if chance is None or low > max(chance, ABOUT_ZERO):
        return ""
    return "the original is not able" if chance <= ABOUT_ZERO else f"the original is at chance ({chance:.0%})"


def ratios(
    name: str, unit: str, values: Sequence[Floats], weights: Sequence[Floats], *, higher_is_better: bool | None
) -> Row:
    """A row of health: ratios of sums over questions, each model's, and differences on the same resamples.

    Args:
        name: what is measured.
        unit: of it.
        values: [models][questions].
        weights: [models][questions]; ones for a mean.
        higher_is_better: direction.

    """
    figures = tuple(_ratio(v, w) for v, w in zip(values, weights, strict=True))
    first = values[0], weights[0]
    differences = tuple(_difference((v, w), first) for v, w in zip(values[1:], weights[1:], strict=True))
    return Row("health", name, "", unit, higher_is_better, len(values[0]), figures, differences)


def compared(
    name: str,
    variant: str,
    unit: str,
    values: Sequence[Floats],
    weights: Sequence[Floats],
    *,
    higher_is_better: bool,
) -> Row:
    """A row of agreement: figures that are comparisons with the original already.

    Args:
        name: what is measured.
        variant: the domain; empty for all.
        unit: of it.
        values: [results][questions].
        weights: [results][questions].
        higher_is_better: direction.

    """
    figures = tuple(_ratio(v, w) for v, w in zip(values, weights, strict=True))
    return Row("agreement", name, variant, unit, higher_is_better, len(values[0]), (None, *figures))


def _figure(value: float, interval: Interval) -> Figure:
    return Figure(value, *interval)


def _ratio(values: Floats, weights: Floats) -> Figure:
    return _figure(_quotient(values, weights), quantiles(resampled(values, weights)))


def _difference(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> Figure:
    """Of two ratios, their questions resampled together."""
    return _figure(_quotient(*one) - _quotient(*other), quantiles(resampled(*one) - resampled(*other)))


def _quotient(values: Floats, weights: Floats) -> float:
    return float(values.sum() / weights.sum())
