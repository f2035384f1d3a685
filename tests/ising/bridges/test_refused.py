"""A pattern is refused by every bridge: their formats hold conditions on what is removed only."""

from __future__ import annotations

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.bridges.highs import Highs
from excise.ising.bridges.lp import write_lp
from excise.ising.bridges.qubo import to_ising, to_qubo
from excise.ising.energies import Energy
from excise.ising.pattern import Pattern
from excise.ising.problem import Problem

PROBLEM = Problem(
    Energy(None, np.eye(4)), 2, pattern=Pattern(((True, False), (False, True)) * 2, name="the pattern of a reader")
)
BRIDGES = {
    "QUBO": lambda folder: to_qubo(PROBLEM),
    "Ising": lambda folder: to_ising(PROBLEM),
    "LP": lambda folder: write_lp(PROBLEM, folder / "a.lp"),
    "HiGHS": lambda folder: Highs().solve(PROBLEM),
}


@pytest.mark.parametrize("bridge", BRIDGES)
def test_a_pattern_is_refused(bridge, tmp_path):
    with pytest.raises(InputError, match="the pattern of a reader, which other programs' formats do not hold"):
        BRIDGES[bridge](tmp_path)
    assert not list(tmp_path.iterdir())
