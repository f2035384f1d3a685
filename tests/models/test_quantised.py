"""Float8 checkpoints: scores are those of the dequantised model, and nothing is read without its scale."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.errors import CheckpointError, MissingExtraError
from excise.measuring.score import score
from excise.models.loading import load
from excise.models.quantised import dequantise
from tests.contexts import context_of
from tests.hub import put_into_cache
from tests.quantised import dequantised, quantise
from tests.random_samples import random_samples
from tests.tiny import tiny_folder

FORMS = ("modelopt", "modelopt-channel", "fp8", "compressed-tensors")


def plain_copy(folder, out):
    """The same checkpoint with its weights dequantised and its quantisation forgotten."""
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json" and path.name != "hf_quant_config.json":
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(dequantised(folder), out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "nemotron_h"])
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_the_dequantised_model(model_type, form, tmp_path):
    folder = quantise(
        tiny_folder(tmp_path / "q", model_type, layers=4, dtype=torch.bfloat16), form, keep=("layers.2.",)
    )
    ours, plain = load(str(folder)), load(str(plain_copy(folder, tmp_path / "plain")))
    weights, expected = ours.stack.model.state_dict(), plain.stack.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    samples = random_samples()
    assert np.array_equal(score(context_of(ours.stack), samples).A, score(context_of(plain.stack), samples).A)
    assert not hasattr(ours.stack.model.config, "quantization_config")
    assert ours.stack.model.generation_config.eos_token_id == 2
    assert ours.stored_dtype == torch.bfloat16


def test_scales_matter(tmp_path):
    """Else the test above would prove nothing."""
    folder = quantise(tiny_folder(tmp_path / "q", "llama", layers=2), "modelopt")
    name = "model.layers.0.mlp.up_proj.weight"
    raw = load_file(folder / "model.safetensors")[name].float()
    assert raw.abs().max() == 448
    assert load(str(folder)).stack.model.state_dict()[name].abs().max() < 2


def test_modelopt_is_found_without_a_word_in_the_config(tmp_path):
    folder = quantise(tiny_folder(tmp_path / "q", "llama", layers=2), "modelopt")
    expected = load(str(folder)).stack.model.state_dict()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    found = load(str(folder)).stack.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError, match="does not say how they are quantised"):
        load(str(folder))


def test_a_weight_without_its_scale_is_refused(tmp_path):
    folder = quantise(tiny_folder(tmp_path / "q", "llama", layers=2), "modelopt")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"there is no model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        load(str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt with NVFP4"),
        ({"quant_method": "modelopt"}, "ModelOpt with an algorithm it does not name"),
        ({"quant_method": "compressed-tensors", "format": "mxfloat-quantized"}, "only float-quantized"),
    ],
)
def test_other_formats_are_refused(settings, message, tmp_path):
    folder = tiny_folder(tmp_path / "q", "llama", layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        load(str(folder))


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_a_tool_that_is_not_installed_is_named(tmp_path):
    folder = tiny_folder(tmp_path / "q", "llama", layers=2)
    settings = {"quant_method": "gptq", "bits": 4, "dataset": "c4", "group_size": 32}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(MissingExtraError, match="needs a package that is not installed"):
        load(str(folder))


def test_packed_weights_are_refused(tmp_path):
    folder = quantise(tiny_folder(tmp_path / "q", "llama", layers=2), "modelopt")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].view(torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is packed"):
        load(str(folder))


@pytest.mark.parametrize(
    ("weight", "scale", "place"),
    [
        ((5, 7), (), lambda row, column: ()),
        ((5, 7), (1,), lambda row, column: 0),
        ((5, 7), (5,), lambda row, column: row),
        ((5, 7), (5, 1), lambda row, column: (row, 0)),
        ((5, 7), (3, 3), lambda row, column: (row // 2, column // 3)),
        ((5, 7), (3, 1, 3, 1), lambda row, column: (row // 2, 0, column // 3, 0)),
        ((4, 5, 7), (4, 3, 3), lambda expert, row, column: (expert, row // 2, column // 3)),
        ((4, 5, 7), (4,), lambda expert, row, column: expert),
        ((4, 5, 7), (4, 5, 1), lambda expert, row, column: (expert, row, 0)),
    ],
)
def test_scales_of_every_shape(weight, scale, place):
    """Element by element, in float64; blocks of 2 × 3, of which those at the edges are cut."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(weight, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(scale, generator=generator) + 0.5
    found = dequantise(values, scales, (2, 3))
    assert found.shape == values.shape
    for index in np.ndindex(*weight):
        expected = values[index].double() * scales[place(*index)].double()
        assert found[index].double().item() == pytest.approx(expected.item(), rel=1e-6)


def test_exponents_as_bytes():
    scale = torch.tensor([[127, 128], [126, 130]], dtype=torch.uint8)
    assert dequantise(torch.ones(2, 2), scale, (1, 1)).tolist() == [[1, 2], [0.5, 8]]


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(CheckpointError, match=r"scales of shape \[4\]"):
        dequantise(torch.ones(5, 7), torch.ones(4), (2, 3))


def test_a_hub_model_is_read_with_its_scales_too(tmp_path, monkeypatch):
    folder = quantise(tiny_folder(tmp_path / "q", "llama", layers=2), "modelopt")
    put_into_cache(folder, "org/model", tmp_path / "cache", monkeypatch)
    ours, expected = (load(source).stack.model.state_dict() for source in ("org/model", str(folder)))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
