"""Checkpoints of bitsandbytes: dequantised where there is no GPU, and pruned as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from excise.measuring.score import score
from excise.models.loading import load
from excise.models.stack import find_stack
from excise.surgery.on_disk import prune_folder
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.surgery.test_on_disk import tensors_of
from tests.tiny import tiny_folder, tiny_tokenizer

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent: pip install 'excise[bitsandbytes]'")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where weights stay in 4 bits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    plain = tiny_folder(place / "plain", "llama", layers=4, **sizes)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=how).save_pretrained(place / "nf4")
    tiny_tokenizer().save_pretrained(place / "nf4")
    return place / "nf4"


def dequantised(folder):
    """The stock model, its matrices replaced before any forward pass, which would repack them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
            linear.weight.data = weight
            model.set_submodule(name, linear)
    return model


def test_scores_are_those_of_the_dequantised_model(folder):
    samples = random_samples()
    expected = score(context_of(find_stack(dequantised(folder))), samples).A
    assert np.array_equal(score(context_of(load(str(folder)).stack), samples).A, expected)


def test_packed_weights_pass_through(folder, tmp_path):
    recipe = prune_folder(folder, [1], tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    for new, old in enumerate(recipe["original_blocks"]):
        for name in (n for n in before if f"layers.{old}." in n):
            assert after[name.replace(f"layers.{old}.", f"layers.{new}.")] == before[name]
    assert "parameters" not in recipe
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    pruned, whole = load(str(tmp_path / "out")).stack.model, load(str(folder)).stack.model
    kept = whole.model.layers[3].mlp.up_proj.weight
    assert torch.equal(pruned.model.layers[2].mlp.up_proj.weight, kept)
