"""Language towers of multimodal models pruned folder to folder, and models that bring their own code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from excise.models.loading import load
from excise.models.stack import gated
from excise.surgery.on_disk import prune_folder
from tests.released import edit_json
from tests.tiny import removable_pair, tiny_config, tiny_folder, tiny_tokenizer

IMAGE, SIDE, PATCH = 287, 32, 16  # id of an image's tokens, and of how many pixels it is
PROCESSORS = {
    "processor_config.json": '{"image_seq_length": 4,\n\n "processor_class": "Gemma3Processor"}',
    "video_preprocessor_config.json": '{"fps":  2}',
    "chat_template.jinja": "{{ messages }}",
}
TOWERS = {"gemma3": "vision_tower", "gemma4": "vision_tower", "qwen3_5": "visual"}


def multimodal(folder, model_type):
    """A random model with its image processor, as people release them."""
    config = tiny_config(model_type)
    if model_type == "gemma3":
        config.vision_config.image_size, config.vision_config.patch_size = SIDE, PATCH
        config.mm_tokens_per_image, config.image_token_index, config.image_token_id = 4, IMAGE, IMAGE
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    for name, text in PROCESSORS.items():
        (folder / name).write_text(text)
    return model


@pytest.mark.parametrize("model_type", TOWERS)
def test_towers_and_processors_stay_as_they_are(model_type, tmp_path):
    model, removed = multimodal(tmp_path / "model", model_type), removable_pair(model_type)
    recipe = prune_folder(tmp_path / "model", removed, tmp_path / "out")
    for name in (*PROCESSORS, "preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("model", "out"))
    outside = [name for name in before if f".{TOWERS[model_type]}." in name or "projector" in name]
    assert outside
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert "left_out" not in recipe
    pruned, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    inputs = {"input_ids": torch.tensor([[7, 81, 250, 33, 9, 120]])}
    if model_type == "gemma3":
        pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
        inputs["pixel_values"] = processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
        inputs["input_ids"] = torch.tensor([[7, *[IMAGE] * 4, 81, 250]])
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    for index in removed:
        model.model.language_model.layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with torch.no_grad():
        expected, found = (m(**inputs, use_cache=False).logits for m in (model, pruned))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


# A Llama under another name, with all that its code and its files say, as on a hub.
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "{model_type}"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
    mine = True
"""
AUTO_MAP = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


def with_code(folder, model_type="llama"):
    tiny_folder(folder, "llama")
    edit_json(folder / "config.json", auto_map=AUTO_MAP, architectures=["MineForCausalLM"])
    (folder / "modeling_mine.py").write_text(CODE.format(model_type=model_type))
    return folder


@pytest.mark.parametrize("options", [(), ("--removed-sublayers", "0.attention"), ("--merge", "code")])
def test_a_model_with_its_own_code_keeps_working(options, tmp_path, excise):
    source, out = with_code(tmp_path / "model"), tmp_path / "out"
    arguments = ("--removed", "1,4", *options, "--out", out, "--trust-remote-code")
    code, _, err = excise("prune", source, *arguments)
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())
    assert (config["auto_map"], config["num_hidden_layers"]) == (AUTO_MAP, 4)
    assert (out / "modeling_mine.py").read_bytes() == (source / "modeling_mine.py").read_bytes()
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert ours.mine
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert not hasattr(stock, "mine")
    ids = torch.tensor([[7, 81, 250, 33, 9, 120]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    if options:
        return
    original = load(str(source), trust_remote_code=True)
    alpha = torch.ones(len(original.stack.sublayers))
    alpha[[s.gate for s in original.stack.sublayers if s.block in (1, 4)]] = 0
    with torch.no_grad(), gated(original.stack, alpha):
        expected = original.stack.model(ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)


def test_code_is_not_run_without_leave(tmp_path, excise):
    source = with_code(tmp_path / "model")
    (source / "modeling_mine.py").write_text("raise SystemExit('executed')\n")
    code, _, err = excise("prune", source, "--removed", "1,4", "--out", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "modeling_mine.py").read_text() == "raise SystemExit('executed')\n"


def test_a_model_type_that_only_code_knows_is_refused_with_the_reason(tmp_path, excise):
    source = with_code(tmp_path / "model", "mine")
    edit_json(source / "config.json", model_type="mine")
    code, _, err = excise("prune", source, "--removed", "1", "--out", tmp_path / "out", "--trust-remote-code")
    assert code == 2
    assert "model_type 'mine' is not known to excise" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
