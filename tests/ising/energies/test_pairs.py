"""Singles and pairs come out exactly as they went in."""

import itertools

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies.pairs import pairs, singles_and_pairs


def test_reproduces_every_single_and_every_pair():
    generator = np.random.default_rng(0)
    damages = {removed: float(generator.normal()) for removed in singles_and_pairs(range(7))}
    assert len(damages) == 7 + 21
    energy = pairs(damages, units=7)
    for removed, damage in damages.items():
        assert energy.energy(removed) == pytest.approx(damage, abs=1e-12)


def test_three_units_cost_what_their_pairs_say():
    damages = {removed: float(sum(removed) + len(removed) ** 2) for removed in singles_and_pairs(range(5))}
    energy = pairs(damages, units=5)
    for a, b, c in itertools.combinations(range(5), 3):
        couplings = sum(damages[p] - damages[p[:1]] - damages[p[1:]] for p in ((a, b), (a, c), (b, c)))
        assert energy.energy([a, b, c]) == pytest.approx(damages[a,] + damages[b,] + damages[c,] + couplings)


def test_a_pair_without_its_singles_and_an_infinite_damage_are_refused():
    with pytest.raises(InputError, match="0, 2 was measured but not both"):
        pairs({(0,): 1.0, (0, 2): 2.0}, units=3)
    with pytest.raises(InputError, match=r"not finite \(first: blocks \[1\]"):
        pairs({(0,): 1.0, (1,): float("inf")}, units=2)
