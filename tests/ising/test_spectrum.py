import json

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.spectrum import Spectrum, State

STATES = (
    State((0, 1, 2), 1.0),
    State((0, 1, 3), 1.5),
    State((3, 4, 5), 2.0),
    State((0, 4, 5), 2.5),
    State((1, 2, 3), 3.0),
)


def spectrum(**fields):
    return Spectrum(STATES, units=7, budget=3, solver="exhaustive", seconds=0.25, **fields)


def test_it_is_a_sequence_of_states():
    assert len(spectrum()) == 5
    assert spectrum()[1].removed == (0, 1, 3)
    assert [state.energy for state in spectrum()] == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_removal_frequency():
    np.testing.assert_allclose(spectrum().removal_frequency(2), [1, 1, 0.5, 0.5, 0, 0, 0])
    np.testing.assert_allclose(spectrum().removal_frequency().sum(), 3)


def test_first_touching():
    assert spectrum().first_touching(5) is STATES[2]
    assert spectrum().first_touching(6) is None


def test_select_by_distance_is_greedy_in_energy():
    assert [s.energy for s in spectrum().select(5, min_distance=4)] == [1.0, 2.0]
    assert [s.energy for s in spectrum().select(2, min_distance=2)] == [1.0, 1.5]


def test_select_without_distance_takes_the_farthest():
    assert [s.energy for s in spectrum().select(2)] == [1.0, 2.0]
    assert len(spectrum().select(50)) == 5


@pytest.mark.parametrize("by", ["hamming", "pearson"])
def test_measures_agree_at_fixed_magnetisation(by):
    # With Σx fixed, 1 − ρ is the Hamming distance times a constant.
    assert spectrum().select(4, by=by) == spectrum().select(4)


def test_pearson_distance_is_one_minus_correlation():
    masks = spectrum().masks().astype(float)
    distance = 1 - np.corrcoef(masks[0], masks[3])[0, 1]
    assert len(spectrum().select(9, by="pearson", min_distance=distance - 1e-9)) >= 2
    kept = spectrum().select(9, by="pearson", min_distance=distance + 1e-9)
    assert STATES[3] not in kept


def test_bad_selections():
    with pytest.raises(InputError, match="1 or more"):
        spectrum().select(0)
    with pytest.raises(InputError, match="hamming"):
        spectrum().select(2, by="cosine")


def test_proof_closes_the_gap():
    proved = spectrum().with_proof()
    assert (proved.certified, proved.lower_bound, proved.gap, proved.proved) == (True, 1.0, 0.0, 5)
    assert proved.lowest(2).proved == 2
    assert proved.lowest(2).certified


def test_where_the_number_is_open_the_states_of_each_number_are_its_lowest():
    states = (State((0, 1), 1.0), State((2,), 2.0), State((0, 3), 3.0), State((1,), 4.0))
    whole = Spectrum(states, 4, None, "exhaustive", 0.1, proved=2)
    found = whole.by_budget()
    assert {m: [s.energy for s in alone] for m, alone in found.items()} == {1: [2.0, 4.0], 2: [1.0, 3.0]}
    assert [(alone.budget, alone.proved, alone.certified) for alone in found.values()] == [(1, 1, False), (2, 1, False)]
    proved = whole.with_proof().by_budget()[1]
    assert (proved.certified, proved.proved, proved.lower_bound) == (True, 2, 2.0)


def test_json_round_trip(tmp_path):
    whole = spectrum(notes=("a note",), seed=3).with_proof()
    value = json.loads(json.dumps(whole.to_json()))
    assert value["states"][0] == {"removed": [0, 1, 2], "energy": 1.0}
    assert {"certified", "lower_bound", "gap", "seconds", "solver"} <= value.keys()
    assert Spectrum.from_json(value) == whole
    whole.save(tmp_path / "spectrum.json")
    assert Spectrum.load(tmp_path / "spectrum.json") == whole


def test_other_json_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a spectrum"):
        Spectrum.load(tmp_path / "other.json")
