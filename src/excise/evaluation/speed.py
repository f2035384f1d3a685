"""Speed and memory: how fast a model reads a prompt and writes an answer, and how much its weights weigh."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from excise.errors import InputError
from excise.evaluation.scores import Metric, Result
from excise.plain import Facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATS, WARM_UP = 3, 1


def speed_settings(prompt_tokens: int, new_tokens: int, batch: int) -> Facts:
    """What a measured speed depends on beside model and machine.

    Raises:
        InputError: a number is below 1, or fewer than two new tokens.

    """
    if prompt_tokens < 1 or new_tokens < 2 or batch < 1:
        raise InputError(
            f"expected a prompt of 1 token or more, 2 new tokens or more and a batch of 1 or more, "
            f"got {prompt_tokens}, {new_tokens} and {batch}"
        )
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, **_machine()}


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    *,
    fingerprint: str,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    seed: int = 0,
) -> Result:
    """Time prefill and greedy decoding with a KV cache on random tokens; the median of three runs after a warm-up.

    Args:
        model: a causal language model of transformers.
        fingerprint: its hash.
        prompt_tokens: length of the prompt; shortened where the model has too few positions.
        new_tokens: tokens decoded after it, one at a time.
        batch: sequences at once.
        seed: of the random tokens.

    Returns:
        `prefill_tokens_per_second`, `decode_tokens_per_second` (over all sequences), `weight_bytes`,
        `cache_bytes_per_token`, and `peak_bytes`: on a GPU the most memory that was allocated, on a CPU the most this
        process ever held, whichever model it was for.

    Raises:
        InputError: a number is out of range.

    """
    settings = speed_settings(prompt_tokens, new_tokens, batch)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        # Beyond its positions a model with learned ones fails, and others are not what they were trained for.
        prompt_tokens = max(1, min(prompt_tokens, positions - new_tokens))
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(model.device)
    on_gpu = prompt.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [_run(model, prompt, new_tokens) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    prefill = [batch * prompt_tokens / seconds for seconds, _, _ in times]
    # The first new token comes out of the prefill.
    decode = [batch * (new_tokens - 1) / seconds for _, seconds, _ in times]
    weights = [*model.parameters(), *model.buffers()]
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_bytes_of_process()
    metrics = {
        "prefill_tokens_per_second": Metric(statistics.median(prefill)),
        "decode_tokens_per_second": Metric(statistics.median(decode)),
        "weight_bytes": Metric(sum(t.numel() * t.element_size() for t in weights), None, False),
        "cache_bytes_per_token": Metric(times[-1][2] / (batch * (prompt_tokens + new_tokens - 1)), None, False),
        "peak_bytes": Metric(peak, None, False),
    }
    details = {
        "prompt_tokens": prompt_tokens,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Result(fingerprint, "speed", "speed", settings, metrics, details)


def _run(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill, seconds of the other tokens, bytes of the cache at the end."""
    start = _now(prompt)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)
    middle = _now(prompt)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return middle - start, _now(prompt) - middle, _cache_bytes(output.past_key_values)


def _now(prompt: Tensor) -> float:
    # Launches return at once: without waiting, one would time those.
    if prompt.device.type == "cuda":
        torch.cuda.synchronize(prompt.device)
    return time.perf_counter()


def _cache_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _peak_bytes_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes on Linux.
    return peak if sys.platform == "darwin" else peak * 1024


def _machine() -> Facts:
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "threads": None, "torch": torch.__version__}
    return {"device": "cpu", "model": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu() -> str:
    """Which CPU this is, as well as the system says."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
