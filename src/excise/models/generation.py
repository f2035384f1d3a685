"""Greedy generation: what a model says by itself, several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from excise.errors import ArchitectureError
from excise.models.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def greedy(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], room: int
) -> list[list[int]]:
    """Continue prompts greedily with a KV cache, by the most probable token and nothing else.

    Shorter prompts are padded on the left. What a checkpoint's generation config says of sampling and of penalties does
    not matter here; its ends do.

    Args:
        stack: the model.
        tokenizer: its own.
        prompts: token ids of each.
        room: most new tokens of each.

    Returns:
        The new tokens of each, the one that ended it included; one of `room` tokens may be cut short.

    Raises:
        ArchitectureError: the model does not generate.

    """
    from transformers import GenerationConfig

    model, ends = stack.model, end_tokens(stack, tokenizer)
    padding = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        real[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        # What is left open is the model's own, and a temperature would be warned of.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        pad_token_id=padding,
        eos_token_id=sorted(ends) or None,
    )
    try:
        found = model.generate(ids.to(stack.device), attention_mask=real.to(stack.device), generation_config=config)
    # Whatever a model raises.
    except Exception as error:
        raise ArchitectureError(f"this {model.config.model_type} does not generate: {error}") from error
    return [_until_end(row[width:].tolist(), ends) for row in found]


def end_tokens(stack: Stack, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's own."""
    told: Any = getattr(stack.model.generation_config, "eos_token_id", None)
    listed = told if isinstance(told, list | tuple) else [told]
    return frozenset(int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None)


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Without the padding behind the first token that ends an answer."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
