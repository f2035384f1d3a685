"""Tiny checkpoints as people release them: in the spelling of transformers 4.57, with files that it does not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_folder

ROPE_THETA = 500_000.0
SIDE_FILES = {
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor",\n   "size": 224}',
    "modeling_mine.py": "raise SystemExit('executed')\n",
    "LICENSE": "do as you like\n",
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "additional_chat_templates/tool.jinja": "{{ messages }}",
}
CARD = """---
license: llama3.2
license_link: LICENSE
language:
- en
- no
base_model: org/grandparent
datasets:
- HuggingFaceTB/smoltalk
tags:
- chat
- 'a: b'
model-index:
- name: original
---

# The original
"""


def edit_json(path: Path, *absent: str, **changes: Any) -> None:
    """Change keys of a JSON file, and take some away."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in absent}, indent=2))


def released_folder(
    path: Path, model_type: str = "llama", layers: int = 6, *, loud: tuple[int, ...] = (), **options: Any
) -> Path:
    """A bfloat16 checkpoint with norms in float32 whose config names no dtype, in the spelling of version 4.57.

    The base of its rotary embeddings is 500,000, where that is one number. What the attention of the blocks `loud` adds
    is twice as large: without blocks 1 and 4 of the Llama, so much is lost that its repair certainly helps.
    """
    theta = {"rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"}}
    plain = model_type not in ("gemma3", "gemma3_text", "gpt2", "qwen3_5", "qwen3_5_text")
    folder = tiny_folder(path, model_type, layers, dtype=torch.bfloat16, **(theta if plain else {}), **options)
    if plain:
        edit_json(folder / "config.json", "rope_parameters", rope_theta=ROPE_THETA)
    if model_type == "qwen3_moe":
        edit_json(folder / "config.json", "num_local_experts", num_experts=4)
    own = {"auto_map": {"AutoModel": "modeling_mine.Mine"}, "mine": {"deep": [1] * layers}}
    edit_json(folder / "config.json", "dtype", **own)
    edit_json(folder / "tokenizer_config.json", "backend", tokenizer_class="PreTrainedTokenizerFast")
    weights = load_file(folder / "model.safetensors")
    weights = {name: w.float() * 1.001 if "norm" in name else w for name, w in weights.items()}
    for name in (name for name in weights for i in loud if f"layers.{i}.self_attn.o_proj" in name):
        weights[name] = weights[name] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "mine": "too"})
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "README.md").write_text(CARD)
    return folder
