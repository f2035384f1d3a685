"""What a model answers to the panel's questions: greedily, in batches, each batch kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from excise import __version__
from excise.artefacts import digest
from excise.context import Context
from excise.data.chats import prompt_ids
from excise.data.files import BadRowError
from excise.data.fit import Fit
from excise.errors import InputError
from excise.evaluation.panel.questions import Question
from excise.interrupts import stop_if_told
from excise.models.generation import end_tokens, greedy

# Decoding one token for many prompts costs hardly more than for one; what limits a batch is its cache, which is small
# beside the activations of a pass.
BATCH_TOKENS, MOST_ROWS = 8, 64

Prompts = Mapping[Question, tuple[int, ...]]


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        prompt: token ids that it was given.
        tokens: token ids that it said, the one that ended it included.
        text: the same as text.
        ended: whether it ended by itself.

    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    ended: bool


def prompts_of(context: Context, questions: Sequence[Question]) -> tuple[Prompts, dict[str, str]]:
    """Token ids of the questions that a model can take, and for the names of the others the reason.

    Raises:
        InputError: the model has no tokenizer.

    """
    tokenizer, stack = context.loaded.tokenizer, context.stack
    if tokenizer is None:
        raise InputError("the panel asks questions, and the model has no tokenizer; put its files beside the weights")
    fit, positions = Fit.of(stack), getattr(stack.config, "max_position_embeddings", None)
    prompts: dict[Question, tuple[int, ...]] = {}
    left_out: dict[str, str] = {}
    for question in questions:
        try:
            ids = prompt_ids([{"role": "user", "content": question.prompt}], tokenizer, thinking=False)
        except BadRowError as error:
            left_out[question.name] = str(error)
            continue
        reason = fit.refusal(np.array(ids))
        if positions is not None and len(ids) + question.room > positions:
            # Where any length can be computed, the model was still trained for no other.
            reason = reason or f"{len(ids)} tokens and {question.room} to answer, and the model has {positions}"
        if reason:
            left_out[question.name] = reason
        else:
            prompts[question] = tuple(ids)
    return prompts, left_out


def ask(context: Context, prompts: Prompts) -> dict[Question, Answer]:
    """Answers of a model, greedy; what the store holds is not asked again.

    Args:
        context: the model and the store.
        prompts: see `prompts_of`.

    """
    stack, tokenizer = context.stack, context.loaded.tokenizer
    ends, identity = end_tokens(stack, tokenizer), context.identity
    answers: dict[Question, Answer] = {}
    with context.progress.stage("panel", sum(len(ids) + question.room for question, ids in prompts.items())) as advance:
        for batch in _batches(prompts, BATCH_TOKENS * context.tokens_per_batch):
            stop_if_told()
            asked = [list(prompts[question]) for question in batch]
            room = batch[0].room
            key = {"excise": __version__, "model_hash": identity, "prompts": digest(asked), "room": room}
            said: Any = context.store.found("answers", key)
            if said is None:
                said = greedy(stack, tokenizer, asked, room)
                context.store.keep("answers", key, said)
            for question, tokens in zip(batch, said, strict=True):
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                answers[question] = Answer(prompts[question], tuple(tokens), text, bool(tokens) and tokens[-1] in ends)
                advance(len(prompts[question]) + room)
    return {question: answers[question] for question in prompts}


def _batches(prompts: Prompts, batch_tokens: int) -> list[list[Question]]:
    """Questions of one room and similar length together, the longest first."""
    batches: list[list[Question]] = []
    for question in sorted(prompts, key=lambda q: (-q.room, -len(prompts[q]))):
        width = len(prompts[batches[-1][0]]) + question.room if batches else 0
        alike = bool(batches) and batches[-1][0].room == question.room
        if alike and len(batches[-1]) < MOST_ROWS and width * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(question)
        else:
            batches.append([question])
    return batches
