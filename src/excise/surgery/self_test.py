"""The proof that a pruned checkpoint is what it should be, by a fresh process that knows nothing of excise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from excise.errors import CheckpointError, InputError
from excise.models.stack import Stack, block_indices, gated
from excise.surgery.stock_load import compare_generation

SEQUENCES, TOKENS = 4, 32  # reference logits stay below 70 MB at a vocabulary of 128k
STOCK_LOAD = Path(__file__).with_name("stock_load.py")


def self_test(
    stack: Stack,
    removed: Sequence[int],
    folder: str | Path,
    input_ids: Tensor | None = None,
    *,
    sublayers: Sequence[int] = (),
    new_tokens: int = 12,
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """Load a pruned checkpoint with stock transformers in a fresh process and compare it with the original.

    The reference is the original model with the gates of what is removed at 0: multiplied, not bypassed, so that
    it shares nothing with the surgery. The process is the same interpreter, isolated and offline; the original stays
    in memory meanwhile.

    Args:
        stack: the original model.
        removed: original indices.
        folder: the checkpoint that `write_pruned` wrote.
        input_ids: token ids [sequences, tokens] without padding, of which the first 4 × 32 are used; None takes
            random ones, always the same.
        sublayers: gates of sublayers removed by themselves.
        new_tokens: length of the greedy continuation, with and without KV cache.
        timeout_s: seconds the process may take.

    Returns:
        `loads_in_stock_transformers` (no missing, unexpected or mismatched keys), `missing_keys`, `unexpected_keys`,
        `mismatched_keys`, `max_abs_logit_difference` (computed in the original's dtype; where the weights were stored
        in a narrower one, it includes that rounding), `max_abs_logit` (of the reference, for scale),
        `cache_agrees` (greedy tokens and logits with and without KV cache, up to ties), if not,
        `original_cache_agrees` (some models differ from themselves there), `max_abs_cache_difference`,
        `generated_tokens`, `generated_tokens_equal`, `tokenizer_loads` (None without a tokenizer), `without_excise`,
        `model_class`, `parameters`, `transformers`, `load_seconds`, `seconds`.

    Raises:
        InputError: `input_ids` is not [sequences, tokens].
        CheckpointError: the checkpoint does not load; the message ends as the process's error output did.

    """
    input_ids = probe(stack, input_ids)
    alpha = torch.ones(len(stack.sublayers))  # on the CPU: a scalar there multiplies a tensor anywhere
    gone = set(block_indices(stack, removed))
    alpha[[s.gate for s in stack.sublayers if s.block in gone or s.gate in sublayers]] = 0
    with torch.no_grad(), gated(stack, alpha):
        logits = stack.model(input_ids=input_ids.to(stack.device), use_cache=False).logits
    with tempfile.TemporaryDirectory(prefix="excise-self-test-") as place:
        reference = Path(place) / "reference.safetensors"
        tensors = {"input_ids": input_ids.cpu().contiguous(), "logits": logits.cpu().contiguous()}
        save_file(tensors, reference, metadata=_settings(stack, new_tokens))
        del logits, tensors
        report = in_fresh_process(STOCK_LOAD, Path(folder), str(reference), timeout_s=timeout_s)
    if not report["cache_agrees"]:  # is that the model's own doing?
        original = compare_generation(stack.model, input_ids.to(stack.device), new_tokens)
        report["original_cache_agrees"] = original["cache_agrees"]
    return report


def probe(stack: Stack, input_ids: Tensor | None) -> Tensor:
    """Token ids [sequences, tokens] to compare on: the first of those given, or random ones, always the same.

    Raises:
        InputError: `input_ids` is not [sequences, tokens].

    """
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(stack.config.vocab_size, (2, TOKENS), generator=generator)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise InputError(f"expected token ids [sequences, tokens], got shape {list(input_ids.shape)}")
    return input_ids[:SEQUENCES, :TOKENS].long()


def _settings(stack: Stack, new_tokens: int) -> dict[str, str]:
    attention = getattr(stack.model.config, "_attn_implementation", None)
    return {
        "dtype": str(stack.model.dtype).removeprefix("torch."),
        "attention": attention if attention in ("eager", "sdpa") else "",
        "device_map": "auto" if stack.device.type == "cuda" else "",
        "new_tokens": str(new_tokens),
    }


def in_fresh_process(script: Path, folder: Path, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """Run a script on a checkpoint folder, by the same interpreter, isolated and offline; return the JSON it prints.

    Raises:
        CheckpointError: it fails, or takes too long.

    """
    command = [sys.executable, "-I", str(script), str(folder.resolve()), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{folder} did not load and answer in a fresh process within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise CheckpointError(f"{folder} fails in stock transformers (exit status {done.returncode}):\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])
