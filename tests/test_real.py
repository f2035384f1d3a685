"""Real weights and real matrices; run by `make test-slow`, skipped with a reason where they are absent."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.gradients import frozen_gradient_loop
from benchmarks.weights import HOW_TO_INSTALL, smollm2

from excise.data import split_samples
from excise.ising.energies import Energy
from excise.ising.problem import Problem
from excise.ising.solvers import solve
from excise.measuring.score import score
from excise.models.loading import load
from excise.run import RunSettings, run
from tests.contexts import context_of

MATRICES = Path(os.environ.get("EXCISE_DATA", "../shared/data")) / "hessians"


@pytest.fixture(scope="module")
def smollm():
    if smollm2() is None:
        pytest.skip(f"no real weights; {HOW_TO_INSTALL}")
    return load(str(smollm2()))


@pytest.mark.slow
@pytest.mark.real
def test_gradients_of_a_real_model_equal_the_loop(smollm):
    calibration, _ = split_samples("starter", smollm.tokenizer, samples=4, held_out=1, tokens=64, seed=0, loss_on="all")
    expected = frozen_gradient_loop(smollm.stack, calibration)
    A = score(context_of(smollm.stack), calibration).A
    assert np.abs(A - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings("ignore:H has rank:UserWarning")
def test_the_main_job_on_a_real_model(smollm, tmp_path):
    torch.set_num_threads(2)
    samples = split_samples("starter", smollm.tokenizer, samples=16, held_out=6, tokens=64, seed=0, loss_on="all")
    settings = RunSettings(model=smollm.source, remove=2, out=tmp_path / "run", verify_states=1, random_states=2)
    facts = run(smollm, *samples, settings)
    assert facts.certified == {"fisher": True, "fisher+linear": True}
    assert facts.pruned_loss - facts.base_loss < 0.6
    assert facts.self_test["loads_in_stock_transformers"]
    assert facts.self_test["cache_agrees"]
    assert facts.self_test["max_abs_logit_difference"] < 1e-3


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("budget", "ground"), [(8, [21, *range(23, 30)]), (12, [7, 11, *range(20, 30)])], ids=["M=8", "M=12"]
)
def test_ground_states_of_a_real_matrix(budget, ground):
    if not MATRICES.is_dir():
        pytest.skip(f"no matrices in {MATRICES}; set EXCISE_DATA to a folder that has hessians/")
    spectrum = solve(Problem(Energy.load(MATRICES / "smollm2_135m_blocks.npy"), budget), states=20)
    assert spectrum.certified
    assert list(spectrum[0].removed) == ground
