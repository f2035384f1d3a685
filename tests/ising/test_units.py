"""Units of a problem: which gates each removes, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.gradients import Gradients
from excise.ising.units import units_of

BLOCKS = (0, 0, 1, 1, 1, 2)
KINDS = ("attention", "feed-forward", "mamba", "moe", "feed-forward", "attention")


@pytest.mark.parametrize(
    ("granularity", "gates", "labels"),
    [
        ("block", ((0, 1), (2, 3, 4), (5,)), ("0", "1", "2")),
        ("attention", ((0,), (5,)), ("0.attention", "2.attention")),
        ("feed-forward", ((1,), (3, 4)), ("0.feed-forward", "1.moe+feed-forward")),
        ("kind=mamba", ((2,),), ("1.mamba",)),
        ("kind=moe", ((3,),), ("1.moe",)),
        ("kind=feed-forward", ((1,), (4,)), ("0.feed-forward", "1.feed-forward")),
        ("sublayer", tuple((g,) for g in range(6)), tuple(f"{b}.{k}" for b, k in zip(BLOCKS, KINDS, strict=True))),
    ],
)
def test_gates_of_units(granularity, gates, labels):
    units = units_of(BLOCKS, KINDS, granularity)
    assert (units.gates, units.labels) == (gates, labels)
    assert units.kinds == tuple("+".join(KINDS[g] for g in group) for group in gates)


@pytest.mark.parametrize("granularity", ["experts", "kind=", "kind=convolution", "layer=3", ""])
def test_other_granularities_are_refused(granularity):
    with pytest.raises(InputError, match="granularity"):
        units_of(BLOCKS, KINDS, granularity)


def test_a_unit_has_the_gradient_of_a_gate_that_its_sublayers_share():
    A = np.random.default_rng(0).normal(size=(4, 6))
    sizes = {"gates": {"parameters": [1, 2, 3, 4, 5, 6]}, "blocks": {"parameters": [10, 20, 30]}}
    gradients = Gradients(A, np.zeros(4), BLOCKS, KINDS, ("a", "b", "c", "d"), sizes=sizes)
    blocks = units_of(BLOCKS, KINDS)
    np.testing.assert_array_equal(blocks.columns(A), gradients.blocks())
    assert blocks.kinds == gradients.block_kinds()
    assert blocks.sizes(gradients) == sizes["blocks"]
    parts = units_of(BLOCKS, KINDS, "feed-forward")
    np.testing.assert_array_equal(parts.columns(A), np.stack([A[:, 1], A[:, 3] + A[:, 4]], axis=1))
    assert parts.sizes(gradients) == {"parameters": [2, 9]}
    assert parts.removed_gates([1, 0]) == (1, 3, 4)
