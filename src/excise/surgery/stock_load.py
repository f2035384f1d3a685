"""Load a checkpoint as anyone would, with stock transformers, and compare it with reference logits.

Run as `stock_load.py FOLDER REFERENCE`, in a process of its own; prints one JSON object. REFERENCE is a safetensors
file with `input_ids` [sequences, tokens], `logits` [sequences, tokens, vocabulary] and, as metadata, `dtype` of the
computation, `attention` (implementation), `device_map` (or empty), `new_tokens` and `trust_remote_code` (or empty).

What goes wrong is part of the report (`load_error`, `logits_error`, `generation_error`, `tokenizer_error`): whether it
is the checkpoint's fault is for the caller to say, who has the original.
"""

import json
import math
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
    trusted = bool(settings["trust_remote_code"])
    report: dict[str, Any] = {"transformers": transformers.__version__, **tokenizer_loads(folder, trusted)}
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            # Never left out: without a word, transformers asks at the terminal.
            trust_remote_code=trusted,
            dtype=getattr(torch, settings["dtype"]),
            device_map=settings["device_map"] or None,
            attn_implementation=settings["attention"] or None,
            output_loading_info=True,
        )
    except Exception as error:  # whatever loading raises
        return {**report, "load_error": said(error)}
    keys = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    report |= {
        **keys,
        "loads_in_stock_transformers": not any(keys.values()) and type(model).__module__.startswith("transformers."),
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "load_seconds": round(time.perf_counter() - start, 3),
    }
    report |= compare(model, input_ids, expected, int(settings["new_tokens"]))
    report["without_excise"] = not any(name.partition(".")[0] == "excise" for name in sys.modules)
    report["seconds"] = round(time.perf_counter() - start, 3)
    return report


def compare(model: Any, input_ids: torch.Tensor, expected: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Compare logits with those expected, and generation with and without cache; what is raised is told."""
    report: dict[str, Any] = {}
    input_ids = input_ids.to(model.device)
    try:
        with torch.no_grad():
            report |= compare_logits(model(input_ids=input_ids, use_cache=False).logits.cpu(), expected)
    except Exception as error:  # whatever a model raises
        report["logits_error"] = said(error)
    if new_tokens > 0:
        try:
            report |= compare_generation(model, input_ids, new_tokens)
        except Exception as error:  # likewise
            report["generation_error"] = said(error)
    return report


def said(error: Exception) -> str:
    """An exception in one line; one of the machine rather than of the checkpoint begins with "this machine"."""
    text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
    if of_memory or isinstance(error, ImportError):
        return f"this machine lacks {'memory' if of_memory else 'a package'}: {text}"
    return text


def compare_logits(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """Compare logits [sequences, tokens, vocabulary]; minus infinity in both is a mask, and equal.

    Returns:
        `logits_finite` and `reference_finite` (masks apart); largest difference and largest logit; and
        `median_logit_difference`, half of the positions differ by at most that. What is not finite is None.

    """
    logits, expected = logits.double(), expected.double()
    difference = (logits - expected).abs().masked_fill(logits == expected, 0.0)
    sizes = expected.abs()[expected.isfinite()]
    return {
        "logits_finite": not bool((logits.isnan() | (logits == math.inf)).any()),
        "reference_finite": not bool((expected.isnan() | (expected == math.inf)).any()),
        "max_abs_logit_difference": _figure(difference.max()),
        "median_logit_difference": _figure(difference.amax(dim=-1).median()),
        "max_abs_logit": _figure(sizes.max()) if len(sizes) else None,
    }


def _figure(value: torch.Tensor) -> float | None:
    return value.item() if value.isfinite() else None


def compare_generation(model: Any, input_ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Generate greedily with and without KV cache; the two agree if tokens and logits do, up to a tie by rounding.

    In half precision rounding may send single tokens to other experts, so there half of the tokens must agree.
    """
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    own = model.generation_config
    # Nothing of its own: stop strings, beams, penalties and assistants belong to whoever uses it.
    model.generation_config = transformers.GenerationConfig()
    try:
        with torch.no_grad():
            cached, plain = (
                model.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=greedy,
                    use_cache=with_cache,
                )
                for with_cache in (True, False)
            )
    finally:
        model.generation_config = own
    tokens_cached, tokens_plain = (run.sequences[:, input_ids.shape[1] :].cpu() for run in (cached, plain))
    with_cache, without = (torch.stack(run.logits, dim=1).double().cpu() for run in (cached, plain))
    # After the first token that differs, the two read different texts.
    same_text = torch.ones_like(tokens_plain, dtype=torch.bool)
    same_text[:, 1:] = (tokens_cached == tokens_plain).cumprod(dim=1)[:, :-1].bool()
    # [sequences, new tokens]; what both mask is equal.
    differences = (with_cache - without).abs().masked_fill(with_cache == without, 0.0).amax(dim=-1)[same_text]
    largest = without.abs()[without.isfinite()].max() if without.isfinite().any() else torch.tensor(math.nan)
    typical = differences.max() if model.dtype in TIE else differences.median()
    return {
        "cache_agrees": bool(typical <= TIE.get(model.dtype, TIE_IN_HALF) * largest.clamp(min=1.0)),
        "max_abs_cache_difference": _figure(differences.max()),
        "generated_tokens": tokens_plain.numel(),
        "generated_tokens_equal": int(((tokens_cached == tokens_plain) & same_text).sum()),
    }


def tokenizer_loads(folder: str, trusted: bool = False) -> dict[str, Any]:
    """Whether the folder's tokenizer loads and encodes, and else why not; None if the folder has none."""
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    if not any((Path(folder) / name).exists() for name in names):
        return {"tokenizer_loads": None}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        encoded = tokenizer("A short sentence.")["input_ids"]
    except Exception as error:  # whatever a tokenizer raises
        return {"tokenizer_loads": False, "tokenizer_error": said(error)}
    return {"tokenizer_loads": True} if encoded else {"tokenizer_loads": False, "tokenizer_error": "it encodes nothing"}


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))  # noqa: T201
