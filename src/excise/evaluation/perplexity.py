"""Perplexity of a text: the whole text once, in windows that do not overlap (the convention of GPTQ and SparseGPT)."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from excise.data.files import read_text
from excise.data.fit import Fit
from excise.data.samples import beginning, windows_of
from excise.errors import InputError
from excise.evaluation.scores import Metric, Result
from excise.plain import Facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 2048
CHUNK = 512  # tokens whose logits are widened to float32 at a time


def text_settings(path: str | Path, window: int | None, limit: int | None) -> Facts:
    """What the perplexity of a text depends on beside the model.

    Args:
        path: a text file, see `excise.data.files.read_text`.
        window: tokens of a window; None takes 2,048, or as many as the model has positions.
        limit: number of windows; None takes all.

    Raises:
        InputError: the file cannot be read as text, or is empty.

    """
    return {"sha256": hashlib.sha256(_read(path).encode()).hexdigest(), "window": window, "limit": limit}


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    fingerprint: str,
    window: int | None = None,
    limit: int | None = None,
    fit: Fit | None = None,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """Measure the perplexity of a text.

    The text is tokenised as one piece and cut into windows, each begun as the tokenizer begins a text: models that were
    trained with a token for that make nothing of a text without it. The first token of each window has no context and
    is not predicted. `bits_per_byte` compares models with different tokenizers.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        path: a text file, see `excise.data.files.read_text`.
        fingerprint: the model's hash.
        window: tokens of a window; None takes 2,048, or as many as the model has positions.
        limit: number of windows; None takes all.
        fit: what the model can take.
        advance: called with the tokens of each finished window.

    Returns:
        Metrics `perplexity`, `loss` (nats per token) and `bits_per_byte`, each with the standard error over windows.

    Raises:
        InputError: the text cannot be read, is shorter than two tokens, or has a window that the model cannot take.

    """
    started, settings, text = time.perf_counter(), text_settings(path, window, limit), _read(path)
    windows = _windows(tokenizer, text, _width(model, window))[:limit]
    for number, ids in enumerate(windows):
        if fit is not None and (refusal := fit.refusal(np.array(ids))):
            raise InputError(f"{path}, window {number}: {refusal}")
    losses = []
    for ids in windows:
        losses.append(_losses(model, ids))
        if advance:
            advance(len(ids))
    sums = np.array([loss.sum() for loss in losses])
    counts = np.array([len(loss) for loss in losses])
    first = len(beginning(tokenizer))
    read = sum(len(tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False).encode()) for ids in windows)
    mean, error = _ratio(sums, counts)
    bits, bits_error = (value and value * counts.sum() / math.log(2) / read for value in (mean, error))
    assert bits is not None
    value = math.exp(mean) if mean < 700 else math.inf
    metrics = {
        "perplexity": Metric(value, None if error is None else value * error, False),
        "loss": Metric(mean, error, False),
        "bits_per_byte": Metric(bits, bits_error, False),
    }
    details = {
        "windows": len(windows),
        "tokens": int(counts.sum()),
        "bytes": read,
        "window": _width(model, window),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return Result(fingerprint, "perplexity", Path(path).name, settings, metrics, details)


def _read(path: str | Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty; expected a text to measure the perplexity of")
    return text


def _width(model: PreTrainedModel, window: int | None) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    return window or min(WINDOW, positions)


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, width: int) -> list[list[int]]:
    windows = [ids for _, ids in windows_of(text, tokenizer, width) if len(ids) >= 2]
    if not windows:
        raise InputError(
            f"the text has no two tokens together in windows of {width}; expected a longer text, or window"
        )
    return windows


@torch.no_grad()
def _losses(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Cross-entropy of every token after the first [tokens − 1], nats."""
    input_ids = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
    targets = input_ids[0, 1:].to(logits.device)
    pieces = [
        cross_entropy(logits[start : start + CHUNK].float(), targets[start : start + CHUNK], reduction="none")
        for start in range(0, len(targets), CHUNK)
    ]
    return torch.cat(pieces).double().cpu().numpy()


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Σ sums / Σ counts and its standard error over windows (the usual linearised ratio estimate)."""
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, None
    residuals = sums - mean * counts
    variance = len(sums) / (len(sums) - 1) * float((residuals**2).sum())
    return mean, math.sqrt(variance) / float(counts.sum())
