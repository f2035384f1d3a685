"""Load a checkpoint with the transformers of this interpreter, and compare it with its original pruned by hand there.

Run as `PYTHON -I old_transformers.py QUESTIONS` by an interpreter with another version of transformers; QUESTIONS is a
JSON file with a list of {"folder", "ids", "text", "original", "kept", "take_weights", "logits"}: the checkpoint, token
ids to compare on, a text to encode, and where there is one the original (a folder or a GGUF file) with the indices of
the blocks that stay. `take_weights` gives the original the checkpoint's weights, where a repair or a training changed
them; `logits` are those expected where there is no original. Prints a JSON list with one answer each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return what this version of transformers makes of a checkpoint."""
    try:
        return compare(question)
    except Exception as error:  # whatever goes wrong is the answer
        return {"error": f"{type(error).__name__}: {error}"}


def compare(question: dict[str, Any]) -> dict[str, Any]:
    """Load, compute and compare."""
    folder, ids = question["folder"], torch.tensor([question["ids"]])
    # Attention as it is defined: sdpa leaves Gemma 2's cap of the scores out.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    logits = logits_of(model, ids)
    if question["original"]:
        expected = logits_of(by_hand(question, model), ids)
    else:
        expected = torch.tensor(question["logits"])
    return {
        "transformers": transformers.__version__,
        "keys": sorted(str(key) for keys in report.values() for key in keys),
        "difference": (logits - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
        "ids": AutoTokenizer.from_pretrained(folder)(question["text"])["input_ids"],
    }


def by_hand(question: dict[str, Any], pruned: Any) -> Any:
    """The original of which only some blocks are left, as one would do it without any tool."""
    path = Path(question["original"])
    place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path.parent if place else path, **options, **place)
    inner = model.model
    inner.layers = nn.ModuleList(inner.layers[i] for i in question["kept"])
    for index, layer in enumerate(inner.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(inner.layers)
    if question["take_weights"]:
        model.load_state_dict(pruned.state_dict(), strict=True)
    return model


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits without a cache."""
    return model.eval()(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    print(json.dumps([answer(question) for question in json.loads(Path(sys.argv[1]).read_text())]))
