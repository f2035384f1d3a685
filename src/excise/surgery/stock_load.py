"""Load a checkpoint as anyone would, with stock transformers, and compare it with reference logits.

Run as `python -I stock_load.py FOLDER REFERENCE`, in a process of its own; prints one JSON object. REFERENCE is a
safetensors file with `input_ids` [sequences, tokens], `logits` [sequences, tokens, vocabulary] and, as metadata,
`dtype` of the computation, `attention` (implementation), `device_map` (or empty), `new_tokens` and `trust_remote_code`
(or empty).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

# Logits that agree to this share of the largest may tie: rounding then picks either token.
TIE = {torch.float64: 1e-5, torch.float32: 1e-3}
TIE_IN_HALF = 5e-2


def main(folder: str, reference: str) -> dict[str, Any]:
    """Return the report on `folder`."""
    with safe_open(reference, framework="pt") as file:
        settings = file.metadata()
        input_ids, expected = file.get_tensor("input_ids"), file.get_tensor("logits")
    start = time.perf_counter()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, settings["dtype"]),
        device_map=settings["device_map"] or None,
        attn_implementation=settings["attention"] or None,
        trust_remote_code=bool(settings["trust_remote_code"]),
        output_loading_info=True,
    )
    load_seconds = time.perf_counter() - start
    input_ids = input_ids.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.cpu()
    keys = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return {
        **keys,
        "loads_in_stock_transformers": not any(keys.values()) and type(model).__module__.startswith("transformers."),
        "max_abs_logit_difference": (logits.double() - expected.double()).abs().max().item(),
        "max_abs_logit": expected.double().abs().max().item(),
        **compare_generation(model, input_ids, int(settings["new_tokens"])),
        **tokenizer_loads(folder, bool(settings["trust_remote_code"])),
        "without_excise": not any(name.partition(".")[0] == "excise" for name in sys.modules),
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "transformers": transformers.__version__,
        "load_seconds": round(load_seconds, 3),
        "seconds": round(time.perf_counter() - start, 3),
    }


def compare_generation(model: Any, input_ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Generate greedily with and without KV cache; the two agree if tokens and logits do, up to a tie by rounding.

    Where the model cannot generate, `cache_agrees` is None and `generation_reason` says why.
    """
    options = {
        "attention_mask": torch.ones_like(input_ids),
        "do_sample": False,
        "num_beams": 1,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "repetition_penalty": 1.0,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    # The model's own settings may want what a test has not: a tokenizer for stop strings, beams, a watermark.
    own = getattr(model, "generation_config", None)
    try:
        model.generation_config = transformers.GenerationConfig()
        with torch.no_grad():
            runs = [model.generate(input_ids, use_cache=cached, **options) for cached in (True, False)]
    except Exception as error:  # whatever a model raises, it is not the surgery's unless the original can do it
        lines = str(error).strip().splitlines() or [""]
        return {"cache_agrees": None, "generation_reason": f"{type(error).__name__}: {lines[0]}"}
    finally:
        model.generation_config = own
    cached, plain = (torch.stack(run.logits, dim=1).double().cpu() for run in runs)  # [sequences, tokens, vocabulary]
    tokens_cached, tokens_plain = (run.sequences[:, input_ids.shape[1] :].cpu() for run in runs)
    # After the first token that differs, the two read different texts.
    same_text = torch.ones_like(tokens_plain, dtype=torch.bool)
    same_text[:, 1:] = (tokens_cached == tokens_plain).cumprod(dim=1)[:, :-1].bool()
    difference = (cached - plain).abs().amax(dim=-1)[same_text].max().item()
    if not (torch.isfinite(cached).all() and torch.isfinite(plain).all()):
        return {"cache_agrees": None, "generation_reason": "logits are not finite"}
    tolerance = TIE.get(model.dtype, TIE_IN_HALF) * max(1.0, plain.abs().max().item())
    return {
        "cache_agrees": difference <= tolerance,
        "max_abs_cache_difference": difference,
        "generated_tokens": tokens_plain.numel(),
        "generated_tokens_equal": int(((tokens_cached == tokens_plain) & same_text).sum()),
    }


def tokenizer_loads(folder: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Whether the folder's tokenizer loads and encodes, and if not, why; None if the folder has none."""
    if not any(
        (Path(folder) / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    ):
        return {"tokenizer_loads": None}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return {"tokenizer_loads": len(tokenizer("A short sentence.")["input_ids"]) > 0}
    except Exception as error:  # whatever a tokenizer raises is what is to be told
        lines = str(error).strip().splitlines() or [""]
        return {"tokenizer_loads": False, "tokenizer_reason": f"{type(error).__name__}: {lines[0]}"}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201
