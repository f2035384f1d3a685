"""The proof that a pruned checkpoint is what it should be, by a fresh process that knows nothing of excise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from excise.data.fit import Fit
from excise.errors import CheckpointError, InputError, UntestableError
from excise.models.headers import read_checkpoint
from excise.models.stack import Stack, block_indices, gated
from excise.surgery.stock_load import compare_generation
from excise.surgery.verdict import TOLERANCE, TOLERANCE_IN_HALF

SEQUENCES, TOKENS = 4, 32  # reference logits stay below 70 MB at a vocabulary of 128k
HALF = {"BF16", "F16", "F8_E4M3", "F8_E5M2"}
# Run in place of a script: the script dies with this process even where that is killed, and cannot be orphaned.
WITH_PARENT = (
    "import ctypes, os, runpy, signal, sys\n"
    "parent = int(sys.argv[1])\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "if os.getppid() != parent: sys.exit(1)\n"
    "sys.argv = sys.argv[2:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)
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
        UntestableError: there was no time or memory to load it.

    """
    input_ids, new_tokens = probe(stack, input_ids, new_tokens)
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
        if original["cache_agrees"] and report["cache_agrees"] is None:
            report["cache_agrees"] = False
    return {"tolerance": tolerance_of(folder), **report}


def tolerance_of(folder: str | Path) -> float:
    """Share of the largest logit by which rounding may move logits: weights may be stored in 16 bits or fewer."""
    half = any(tensor.dtype in HALF for tensor in read_checkpoint(folder).tensors)
    return TOLERANCE_IN_HALF if half else TOLERANCE


def probe(stack: Stack, input_ids: Tensor | None, new_tokens: int) -> tuple[Tensor, int]:
    """Token ids [sequences, tokens] to compare on, the first of those given or always the same random ones.

    With them comes how many tokens to generate. Together they stay within the positions that a model learned.

    Raises:
        InputError: `input_ids` is not [sequences, tokens].

    """
    fit = Fit.of(stack)
    longest = TOKENS + new_tokens if fit.positions is None else min(TOKENS + new_tokens, fit.positions)
    new_tokens = min(new_tokens, longest // 2)
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(min(stack.config.vocab_size, fit.vocabulary), (2, TOKENS), generator=generator)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise InputError(f"expected token ids [sequences, tokens], got shape {list(input_ids.shape)}")
    return input_ids[:SEQUENCES, : longest - new_tokens].long(), new_tokens


def _settings(stack: Stack, new_tokens: int) -> dict[str, str]:
    attention = getattr(stack.model.config, "_attn_implementation", None)
    return {
        "dtype": str(stack.model.dtype).removeprefix("torch."),
        "attention": attention if attention in ("eager", "sdpa") else "",
        "device_map": "auto" if stack.device.type == "cuda" else "",
        "new_tokens": str(new_tokens),
        # Its own code ran when the original was loaded, by leave of the user; the pruned model carries the same.
        "trust_remote_code": "yes" if type(stack.model).__module__.startswith("transformers_modules.") else "",
    }


def in_fresh_process(script: Path, folder: Path, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """Run a script on a checkpoint folder, by the same interpreter, isolated and offline; return the JSON it prints.

    Raises:
        CheckpointError: it fails.
        UntestableError: it takes too long, or too much memory.

    """
    command = [sys.executable, "-I", "-c", WITH_PARENT, str(os.getpid()), str(script), str(folder.resolve())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise UntestableError(f"a fresh process did not load it and answer within {timeout_s:.0f} s") from None
    if done.returncode == -signal.SIGKILL:
        raise UntestableError("the fresh process that loaded it was killed, as the system does when memory runs out")
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise CheckpointError(f"{folder} fails in stock transformers (exit status {done.returncode}):\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])
