"""Speed and memory: how fast a model reads a prompt and writes an answer, and how much its weights weigh."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from excise.errors import InputError
from excise.evaluation.scores import Metric, Result
from excise.ising.times import Request
from excise.plain import Facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATS, WARM_UP = 3, 1


def speed_settings(prompt_tokens: int, new_tokens: int, batch: int, device: torch.device) -> Facts:
    """What a measured speed depends on beside the model, on a device.

    Raises:
        InputError: a number is below 1, or fewer than two new tokens.

    """
    if prompt_tokens < 1 or new_tokens < 2 or batch < 1:
        raise InputError(
            f"expected a prompt of 1 token or more, 2 new tokens or more and a batch of 1 or more, "
            f"got {prompt_tokens}, {new_tokens} and {batch}"
        )
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, **machine(device)}


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
        `cache_bytes_per_token`, and `peak_bytes`: on GPUs the most memory that was allocated, on a CPU the most this
        process ever held, whichever model it was for.

    Raises:
        InputError: a number is out of range.

    """
    settings = speed_settings(prompt_tokens, new_tokens, batch, model.device)
    request = Request(prompt_tokens, new_tokens, batch).within(positions(model))
    prompt, prompt_tokens = random_prompt(model, request, seed), request.prompt_tokens
    weights = [*model.parameters(), *model.buffers()]
    gpus = {t.device for t in weights if t.device.type == "cuda"}
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    times = [_run(model, prompt, new_tokens) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    prefill = [batch * prompt_tokens / seconds for seconds, _, _ in times]
    decode = [batch * (new_tokens - 1) / seconds for _, seconds, _ in times]
    peak = sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else _peak_bytes_of_process()
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


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model takes at most; None where its config names no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def random_prompt(model: PreTrainedModel, request: Request, seed: int = 0) -> Int[Tensor, "batch tokens"]:
    """Random tokens [batch, tokens] where the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (request.batch, request.prompt_tokens)
    return torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(model.device)


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer on its way.

    Attributes:
        token: [batch, 1], the last one decoded.
        cache: of all before it, of the class that the model makes.
        seconds: that this token took; the first comes out of the prefill.

    """

    token: Int[Tensor, "batch 1"]
    cache: Any
    seconds: float


@torch.no_grad()
def read_prompt(model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"]) -> Answer:
    """Read a prompt [batch, tokens] and give the first token of its greedy answer."""
    start = _now(prompt)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)
    return Answer(token, output.past_key_values, _now(prompt) - start)


@torch.no_grad()
def next_token(model: PreTrainedModel, answer: Answer) -> Answer:
    """Go on with an answer, whose cache grows with it."""
    start = _now(answer.token)
    output = model(input_ids=answer.token, past_key_values=answer.cache, use_cache=True)
    token = output.logits[:, -1:].argmax(dim=-1)
    return Answer(token, output.past_key_values, _now(answer.token) - start)


def _run(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill, seconds of the other tokens, bytes of the cache at the end."""
    answer = read_prompt(model, prompt)
    prefill, decode = answer.seconds, 0.0
    for _ in range(new_tokens - 1):
        answer = next_token(model, answer)
        decode += answer.seconds
    return prefill, decode, _cache_bytes(answer.cache)


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


def machine(device: torch.device) -> Facts:
    """What the speed of a model on a device depends on beside the model: device, threads and PyTorch."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": None, "torch": torch.__version__}
    return {"device": "cpu", "model": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu() -> str:
    """Which CPU this is, as well as the system says."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
