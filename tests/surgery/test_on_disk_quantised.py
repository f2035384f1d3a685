"""Quantised checkpoints on disk: tensors kept byte for byte, lists renumbered, computing what the original does."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from excise.models.loading import load
from excise.models.stack import gated
from excise.surgery.on_disk import prune_folder
from tests.quantised import quantise
from tests.surgery.test_on_disk import tensors_of
from tests.tiny import tiny_folder

REMOVED, KEPT = [1, 4], [0, 2, 3, 5]
PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120, 64, 200]])
STACK = {"llama": "model.layers", "nemotron_h": "backbone.layers"}
# Per model type: parts of names that stay unquantised; of blocks 4 (removed) and 5 (kept) of each.
UNQUANTISED = {"llama": ("layers.4.mlp.", "layers.5.mlp."), "nemotron_h": ("layers.4.mixer.", "layers.5.mixer.up_proj")}
LIST = {"modelopt": "ignore", "fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}


@torch.no_grad()
def logits_of(model):
    return model(PROMPT, use_cache=False).logits


@pytest.fixture(params=[(t, f) for t in STACK for f in LIST], ids="-".join)
def case(request, tmp_path):
    model_type, form = request.param
    source = tiny_folder(tmp_path / "model", model_type, dtype=torch.bfloat16)
    return model_type, form, quantise(source, form, keep=UNQUANTISED[model_type])


def test_float8_passes_through(case, tmp_path):
    model_type, form, source = case
    prune_folder(source, REMOVED, tmp_path / "out")
    stack, before, after = STACK[model_type], tensors_of(source), tensors_of(tmp_path / "out")
    assert {dtype for dtype, _, _ in after.values()} >= {"F8_E4M3", "BF16"}
    expected = {}
    for name, value in before.items():
        head, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if not name.startswith(f"{stack}."):
            expected[name] = value
        elif int(head) in KEPT:
            expected[f"{stack}.{KEPT.index(int(head))}.{rest}"] = value
    assert after == expected

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    listed = config["quantization_config"][LIST[form]]
    assert listed
    plain = {name for name, (dtype, shape, _) in after.items() if dtype == "BF16" and len(shape) == 2}
    last = {name.removesuffix(".weight") for name in plain if name.startswith(f"{stack}.3.") and "proj" in name}
    assert set(listed) == last | {"lm_head"}
    if form == "modelopt":
        own = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
        assert own["exclude_modules"] == listed
        assert any(name.endswith("k_scale") for name in after)


def test_the_pruned_one_computes_what_the_gated_original_does(case, tmp_path):
    _, _, source = case
    prune_folder(source, REMOVED, tmp_path / "out")
    original, pruned = load(str(source)).stack, load(str(tmp_path / "out")).stack
    alpha = torch.ones(6)
    alpha[REMOVED] = 0
    with gated(original, alpha):
        expected = logits_of(original.model)
    torch.testing.assert_close(logits_of(pruned.model), expected, rtol=1e-5, atol=1e-5)


def test_nemotron_for_every_loader(tmp_path):
    """As its maker writes it: `hybrid_override_pattern` and `num_hidden_layers`, and no list of types."""
    source = tiny_folder(tmp_path / "model", "nemotron_h")
    config = json.loads((source / "config.json").read_text())
    config.pop("layers_block_type", None)
    config |= {"hybrid_override_pattern": "MEM*-E", "num_hidden_layers": 6}
    (source / "config.json").write_text(json.dumps(config))
    prune_folder(source, REMOVED, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["num_hidden_layers"], after["hybrid_override_pattern"]) == (4, "MM*E")
    assert "layers_block_type" not in after  # which its maker's own config class computes, and cannot be given
    before, read = (AutoConfig.from_pretrained(folder).layers_block_type for folder in (source, tmp_path / "out"))
    assert read == [before[i] for i in KEPT]


def test_stock_transformers_reads_the_pruned_fine_grained_checkpoint_likewise(tmp_path):
    """transformers dequantises this format itself where there is no GPU: an independent reader of what was written."""
    source = tiny_folder(tmp_path / "model", "llama", dtype=torch.bfloat16)
    quantise(source, "fp8", keep=UNQUANTISED["llama"])
    prune_folder(source, REMOVED, tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    expected = load(str(tmp_path / "out")).stack.model.bfloat16().state_dict()
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].bfloat16(), expected[name]) for name in expected)
