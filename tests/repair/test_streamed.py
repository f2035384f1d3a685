"""A streamed model is repaired and written as one in memory is, to the last byte."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from excise.models.loading import load
from excise.models.stack import removable_indices
from excise.repair.measured import known_repaired, measure_repaired
from excise.repair.several import repair_removals, write_removal
from excise.surgery.check import check_loaded
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import MODEL_TYPES, STANDING, removable_pair, tiny_folder

FITTING, JUDGING = random_samples([11, 7, 13, 5, 9]), random_samples([8, 12, 6], seed=1)


PARAMS = [pytest.param(name, marks=() if name in STANDING else pytest.mark.slow) for name in MODEL_TYPES]


@pytest.fixture(scope="module", params=PARAMS)
def both(request, tmp_path_factory):
    """The same checkpoint, resident and streamed."""
    folder = str(tiny_folder(tmp_path_factory.mktemp("streamed") / "model", request.param, 6))
    return [load(folder, placement=placement, dtype="float32") for placement in ("resident", "streamed")]


def contexts(both):
    return [context_of(loaded.stack, batch_tokens=24) for loaded in both]


@pytest.mark.parametrize("statistic", ["loss", "rejection"])
def test_damage_after_repair_is_the_same(both, statistic):
    pair = removable_pair(both[0].stack.config.model_type)
    others = [(1,), (2,), (1, 2), (2, 3, 5), (3, 5), (4, 5), (0, 1)]
    removals = [r for r in (pair, *others) if not set(r) & set(both[0].stack.fixed)]
    resident, streamed = (measure_repaired(c, FITTING, JUDGING, removals, statistic=statistic) for c in contexts(both))
    np.testing.assert_allclose(streamed.sums, resident.sums, rtol=1e-6, atol=2e-6)


def test_repairs_and_checkpoints_are_the_same(both, tmp_path):
    removed = removable_indices(both[0].stack, removable_pair(both[0].stack.config.model_type))
    written, losses = [], []
    for name, loaded, context in zip(("resident", "streamed"), both, contexts(both), strict=True):
        identity = context.identity
        repairs = repair_removals(context, [removed], FITTING, JUDGING)
        losses.append([(f.losses.pruned, f.losses.repaired) for f in repairs.fitted.values() if f.losses])
        with repairs.applied(loaded.stack, removed, always=True):
            # Measurements of the repaired model must not be taken for those of the original.
            assert (context.identity != identity) == bool(repairs.fitted)
        assert context.identity == identity

        def test(place, loaded=loaded):
            return check_loaded(loaded.stack, removed, place, source=loaded.folder, stored=loaded.stored_dtype)

        report = write_removal(loaded, removed, repairs, tmp_path / name, None, test)["self_test"]
        assert report["passed"], report
        written.append(
            {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (tmp_path / name).glob("*.safetensors")
            }
        )
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    assert written[0] == written[1]


def test_a_sweep_that_is_stopped_keeps_every_candidate_that_was_measured(tmp_path):
    stack = load(str(tiny_folder(tmp_path / "model", "llama", 6)), placement="streamed", dtype="float32").stack
    removals = [(1,), (2,), (1, 2), (3, 5)]
    expected = measure_repaired(context_of(stack), FITTING, JUDGING, removals)
    place, measured = tmp_path / "store", []

    def stop(tokens):
        measured.append(tokens)
        if len(measured) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_repaired(context_of(stack, place, stop), FITTING, JUDGING, removals)
    assert len(known_repaired(context_of(stack, place), FITTING, JUDGING, "loss")) == 2
    again = []
    found = measure_repaired(context_of(stack, place, again.append), FITTING, JUDGING, removals)
    assert len(again) == 1 + 2
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-6)
