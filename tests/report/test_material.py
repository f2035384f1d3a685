"""Whatever a folder holds is found, and what does not fit is refused or named."""

import json

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.report.material import gather
from tests.report.folders import add_spectra, full_folder, lowest, run_folder


def test_everything_in_a_folder_is_found(tmp_path):
    facts = full_folder(tmp_path)
    found = gather(tmp_path)
    assert found.run == facts
    assert found.blocks == 12
    assert found.model == "org/model"
    assert list(found.spectra["fisher"]) == [1, 2, 3, 4, 5]
    assert found.budgets == (1, 2, 3, 4, 5)
    assert found.sizes == tuple(range(1000, 1012))
    assert found.kinds[0] == "attention+feed-forward"
    assert found.compare["rows"]
    assert len(found.scores.models) == 3
    assert list(found.spectra["fitted"]) == [3]
    assert set(found.energies) == {"fisher", "fisher+linear", "fitted-3"}
    assert found.refined[3]["removed"] == [1, 4, 5]
    assert found.healing["healed"]["losses"]["healed"] == 3.25


def test_a_removal_proposed_twice_is_one_with_two_names(tmp_path):
    facts = run_folder(tmp_path)
    measured = gather(tmp_path).measured[3]
    assert len({m.removed for m in measured}) == len(measured)
    twice = next(m for m in measured if len(m.methods) > 1)
    assert set(twice.methods) == {"fisher:0", "norm-ratio"}
    assert [m.delta for m in measured] == sorted(m.delta for m in measured)
    assert min(c["delta"] for c in facts["candidates"]) == measured[0].delta


def test_runs_of_several_budgets_lie_side_by_side(tmp_path):
    for budget in (4, 2):
        run_folder(tmp_path / f"m{budget}", budget=budget)
    found = gather(tmp_path)
    assert [run["budget"] for run in found.runs] == [2, 4]
    assert found.budgets == (2, 4)
    assert found.run["budget"] == 2


def test_a_comparison_stands_in_where_no_run_measured(tmp_path):
    full_folder(tmp_path)
    found = gather(tmp_path)
    assert [m.methods for m in found.measured[2]] == [("sleb", "norm-ratio", "random")]  # the merge is no removal
    assert not any("sleb" in m.methods for m in found.measured[3])


def test_verified_json_adds_measurements_under_any_name(tmp_path):
    run_folder(tmp_path)
    more = {"method": "given:0", "removed": [0], "energy": 1.0, "loss": 3.5, "delta": 0.5, "perplexity": 33.0}
    (tmp_path / "one-block.json").write_text(json.dumps({"base_loss": 3.0, "candidates": [more]}))
    assert gather(tmp_path).measured[1][0].methods == ("given:0",)


def test_a_spectrum_over_other_units_is_left_out_and_named(tmp_path):
    run_folder(tmp_path)
    lowest(Energy(None, np.eye(9)), 2).save(tmp_path / "spectrum-sublayers.json")
    found = gather(tmp_path)
    assert list(found.spectra) == ["fisher"]
    assert "spectrum-sublayers.json" in found.left_out[0]


def test_spectra_alone_suffice(tmp_path):
    add_spectra(tmp_path, range(2, 4))
    found = gather(tmp_path)
    assert found.blocks == 12
    assert found.run == {}
    assert found.model == tmp_path.name


def test_what_cannot_be_reported_on_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        gather(tmp_path / "absent")
    (tmp_path / "settings.json").write_text('{"anything": 1}')
    with pytest.raises(InputError, match="nothing to report"):
        gather(tmp_path)
    run_folder(tmp_path / "a")
    other = run_folder(tmp_path / "b", name="org/other")
    (tmp_path / "b" / "run.json").write_text(json.dumps({**other, "model_hash": "f" * 64}))
    with pytest.raises(InputError, match="different models"):
        gather(tmp_path)


@pytest.mark.parametrize("blocks", [0, -3, 2**31])
def test_a_number_of_blocks_that_no_model_has_is_refused(tmp_path, blocks):
    facts = run_folder(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**facts, "blocks": blocks}))
    with pytest.raises(InputError, match=r"run\.json speaks of .* blocks"):
        gather(tmp_path)
