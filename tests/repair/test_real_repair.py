"""Closed-form repair of a real model."""

import pytest
from benchmarks.weights import HOW_TO_INSTALL, smollm2

from excise.context import Context
from excise.data import load_samples
from excise.models.loading import load
from excise.repair.repair import repair


@pytest.mark.slow
@pytest.mark.real
def test_repair_undoes_part_of_the_damage_on_unseen_chats():
    if smollm2() is None:
        pytest.skip(f"no real weights; {HOW_TO_INSTALL}")
    loaded = load(str(smollm2()))
    samples = load_samples("starter", loaded.tokenizer, samples=52, tokens=128, seed=0)
    fitted = repair(Context(loaded), (*range(12, 19), 26), samples[:40], held_out=samples[40:])
    print(fitted.describe()["steps"], fitted.losses)
    assert fitted.losses.delta_before > 0.8
    assert fitted.losses.delta_after < 0.9 * fitted.losses.delta_before
