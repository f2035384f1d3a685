"""Repairs of float8 checkpoints: what is refitted is float8 again, as it was measured; nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from excise.context import Context
from excise.models.loading import load
from excise.models.quantised import dequantise, quantise
from excise.repair.refitted import Losses
from excise.repair.several import Repairs, is_repairable, repair_removals, write_removal
from excise.surgery.check import check_loaded
from excise.surgery.on_disk import prune_folder
from tests.quantised import quantise as quantised_folder
from tests.random_samples import random_samples
from tests.surgery.test_on_disk import tensors_of
from tests.tiny import tiny_folder

SAMPLES, HELD_OUT = random_samples([16] * 30), random_samples([14] * 6, seed=1)
FORMS = ("modelopt", "modelopt-channel", "fp8", "compressed-tensors")


def renumbered(name, removed):
    """Name of a tensor in the pruned checkpoint; that of a hybrid differs from the model's in its beginning."""
    head, _, rest = name.partition("layers.")
    block, _, rest = rest.partition(".")
    head = "backbone." if "mixer." in rest else head
    return f"{head}layers.{int(block) - sum(i < int(block) for i in removed)}.{rest}"


def parameter(model, name):
    return name if name.split(".")[0] in dict(model.named_children()) else f"model.{name.partition('.')[2]}"


def repaired(folder, removed, out):
    """Repair a removal, write it whether it helps or not, and return what was fitted and what was said."""
    loaded = load(str(folder))
    fitted = repair_removals(Context(loaded), [removed], SAMPLES, HELD_OUT).fitted[removed]
    repairs = Repairs({removed: replace(fitted, losses=Losses(1.0, 2.0, 1.5))})
    test = partial(check_loaded, loaded.stack, removed, source=folder, stored=loaded.stored_dtype)
    return fitted, write_removal(loaded, removed, repairs, out, test=test)


@pytest.mark.parametrize("model_type", ["llama", "nemotron_h"])
@pytest.mark.parametrize("form", FORMS)
def test_refitted_matrices_are_float8_again_and_nothing_else_changes(model_type, form, tmp_path):
    folder = tiny_folder(tmp_path / "model", model_type, dtype=torch.bfloat16)
    quantised_folder(folder, form, keep=("layers.4.",))  # plain, and refitted as such
    removed = (2, 3) if model_type == "llama" else (1, 2)
    fitted, said = repaired(folder, removed, tmp_path / "out")
    assert said["self_test"]["loads_in_stock_transformers"] is not False
    assert said["self_test"]["max_abs_logit_difference"] < 1e-4

    prune_folder(folder, removed, tmp_path / "plain")
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert {name: value[:2] for name, value in before.items()} == {name: value[:2] for name, value in after.items()}
    changed = {name for name in before if before[name] != after[name]}
    refitted = {renumbered(name, removed) for name in fitted.weights}
    assert len(refitted) == 2
    assert {before[name][0] for name in refitted} == ({"F8_E4M3", "BF16"} if model_type == "llama" else {"F8_E4M3"})
    assert refitted <= changed <= {f"{name}{end}" for name in refitted for end in ("", "_scale", "_scale_inv")}
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("plain", "out")]
    assert configs[0] == configs[1]

    # What is read back is what was measured, to the last bit.
    read = load(str(tmp_path / "out")).stack.model
    for name, weight in fitted.weights.items():
        assert torch.equal(read.get_parameter(parameter(read, renumbered(name, removed))).data, weight.float())


def test_stock_transformers_reads_the_repaired_checkpoint_likewise(tmp_path):
    folder = quantised_folder(tiny_folder(tmp_path / "model", "llama", dtype=torch.bfloat16), "fp8")
    repaired(folder, (2, 3), tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    expected = load(str(tmp_path / "out")).stack.model.bfloat16().state_dict()
    assert all(torch.equal(weight.bfloat16(), expected[name]) for name, weight in theirs.state_dict().items())


def test_experts_that_are_fused_when_read_are_left_alone_with_the_reason(tmp_path):
    folder = quantised_folder(tiny_folder(tmp_path / "model", "mixtral", dtype=torch.bfloat16), "fp8")
    loaded = load(str(folder))
    repairs = repair_removals(Context(loaded), [(2,)], SAMPLES, HELD_OUT)
    assert "several float8 tensors" in repairs.refused[(2,)]
    assert not is_repairable(loaded, SAMPLES)


@pytest.mark.parametrize("values", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("shape", "scale", "block"),
    [
        ((5, 7), torch.ones(()), (128, 128)),
        ((5, 7), torch.ones(5, 1), (128, 128)),
        ((40, 50), torch.ones(3, 4), (16, 16)),
        ((40, 50), torch.ones(3, 4, dtype=torch.bfloat16), (16, 16)),
        ((3, 4, 6), torch.ones(3), (2, 2)),
        ((40, 50), torch.full((3, 4), 127, dtype=torch.uint8), (16, 16)),
        ((5, 7), torch.ones(5, 1).to(torch.float8_e8m0fnu), (128, 128)),
    ],
)
def test_a_weight_survives_float8_up_to_its_rounding(values, shape, scale, block):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    weight[0] = 0
    stored, scales = quantise(weight, values, scale, block)
    assert (stored.dtype, scales.dtype, scales.shape) == (values, scale.dtype, scale.shape)
    back = dequantise(stored, scales, block)
    # Half a step of the mantissa; what is small beside the largest of its group has fewer digits.
    step = torch.finfo(values).eps / 2
    assert ((back - weight).abs() <= step * weight.abs() + weight.abs().max() * 2 * torch.finfo(values).tiny).all()
    # Once more changes nothing; of two powers of two as scales that say the same it may take the other.
    assert torch.equal(dequantise(*quantise(back, values, scales, block), block), back)
