"""Generation: what a model says by itself, several prompts at once, greedily or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from excise.artefacts import digest
from excise.errors import ArchitectureError
from excise.models.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Scores = Callable[[Tensor, Tensor], Tensor]


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
    return _generated(stack, tokenizer, prompts, room)


def sampled(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    room: int,
    *,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """As `greedy`, with each token sampled from softmax(logits / temperature).

    What a prompt gets depends on it and the seed, and not on what is asked beside or before it: the most probable token
    is taken of logits / temperature + noise, which are samples of that distribution where the noise is Gumbel's
    (Gumbel, 1954; Maddison et al., 2014, arXiv 1411.0030), drawn for each prompt by itself, on the CPU.

    Args:
        stack: the model.
        tokenizer: its own.
        prompts: token ids of each.
        room: most new tokens of each.
        temperature: above 0.
        seed: of the sampling.

    """
    generators = [torch.Generator().manual_seed(int(digest([seed, list(prompt)])[:15], 16)) for prompt in prompts]

    def noisy(_: Tensor, scores: Tensor) -> Tensor:
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=each) for each in generators]
        return scores / temperature - torch.stack(drawn).log().to(scores.device)

    return _generated(stack, tokenizer, prompts, room, [noisy])


@torch.no_grad()
def _generated(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    room: int,
    scores: Sequence[Scores] = (),
) -> list[list[int]]:
    """Greedy by what `scores` make, one after the other, of tokens so far and logits [batch, vocabulary]."""
    from transformers import GenerationConfig, LogitsProcessorList

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
        found = model.generate(
            ids.to(stack.device),
            attention_mask=real.to(stack.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(scores),
        )
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
