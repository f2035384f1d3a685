"""Agreement with the original on the original's own greedy answers, token by token.

The original is recorded first, so that the two need not be in memory together: at every token its `KEPT` most probable
ones, and the probability of all others as one term, as a recorded teacher is. With all others as one, divergence and
total variation are lower bounds, close where little is left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from excise.context import Context
from excise.data.batches import IGNORED, Batch
from excise.data.samples import Sample, Samples
from excise.evaluation.panel.answers import Answer
from excise.evaluation.panel.questions import Question
from excise.measuring.distributions import top_divergence
from excise.measuring.losses import positions_at_once
from excise.measuring.passes import Rows, each_batch
from excise.models.stack import Stack

KEPT = 64


@dataclass(frozen=True, eq=False)
class Recording:
    """The original at each token of its own answers.

    Attributes:
        samples: prompts with their answers, of which the answers count.
        rows: of each sample `tokens` and `log_probs` [samples, places, kept], and `rest` [samples, places], the
            probability of all other tokens; places behind an answer's end are 0.
        model_hash: identity of the original.

    """

    samples: Samples
    rows: Rows
    model_hash: str

    @property
    def kept_mass(self) -> float:
        """Mean probability of the kept tokens."""
        places = sum(sample.targets for sample in self.samples)
        return 1 - float(self.rows["rest"].sum(dtype=np.float64)) / max(1, places)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Sums over the tokens of each answer.

    Attributes:
        tokens: [samples], their number.
        top1: [samples], of tokens that are the most probable one of both.
        acceptance: [samples], of 1 − total variation: how probably speculative decoding keeps the draft's token.
            Source: Leviathan et al., Fast inference from transformers via speculative decoding (2023), theorem 3.5.
        kl: [samples], of KL(original ‖ model), nats.

    """

    tokens: Float[np.ndarray, " samples"]
    top1: Float[np.ndarray, " samples"]
    acceptance: Float[np.ndarray, " samples"]
    kl: Float[np.ndarray, " samples"]


def as_samples(answers: Mapping[Question, Answer]) -> Samples:
    """Prompts with their answers as samples, of which the answers count."""
    items = [
        Sample(
            question.name,
            np.array([*answer.prompt, *answer.tokens], dtype=np.int64),
            np.array([False] * len(answer.prompt) + [True] * len(answer.tokens)),
            question.capability,
        )
        for question, answer in answers.items()
    ]
    return Samples(tuple(items), {"data": "panel"})


def record(context: Context, answers: Mapping[Question, Answer]) -> Recording:
    """Record the original at its own answers; an interrupted recording goes on.

    Args:
        context: the original and the store.
        answers: its own.

    """
    samples, stack = as_samples(answers), context.stack
    places = max(sample.targets for sample in samples)
    kept = min(KEPT, stack.model.config.get_text_config().vocab_size)

    def rows_of(number: int, batch: Batch) -> Rows:
        size = len(batch.indices), places
        tokens, log_probs = np.zeros((*size, kept), np.int32), np.zeros((*size, kept), np.float32)
        rest = np.zeros(size, np.float32)
        for row, place, log_p in _counted(stack, batch):
            values, top = log_p.topk(kept)
            at = row.numpy(), place.numpy()
            tokens[at], log_probs[at] = top.cpu().numpy(), values.float().cpu().numpy()
            rest[at] = _rest(log_p, top).float().cpu().numpy()
        return {"tokens": tokens, "log_probs": log_probs, "rest": rest}

    key = {"stage": "recording", "kept": kept, "places": places}
    return Recording(samples, each_batch(context, samples, "recording", key, rows_of), context.identity)


def agree(context: Context, recording: Recording) -> Agreement:
    """How far a model agrees with a recorded original; an interrupted pass goes on.

    Args:
        context: the model and the store.
        recording: of its original.

    """
    stack, recorded = context.stack, recording.rows

    def rows_of(number: int, batch: Batch) -> Rows:
        sums = {name: np.zeros(len(batch.indices)) for name in ("tokens", "top1", "acceptance", "kl")}
        for row, place, log_q in _counted(stack, batch):
            at = np.array(batch.indices)[row.numpy()], place.numpy()
            top, log_p = (torch.from_numpy(recorded[n][at]).to(log_q.device) for n in ("tokens", "log_probs"))
            rest = torch.from_numpy(recorded["rest"][at]).to(log_q.device)
            terms = _compared(log_q, top.long(), log_p, rest)
            for name, values in {"tokens": torch.ones_like(rest), **terms}.items():
                np.add.at(sums[name], row.numpy(), values.double().cpu().numpy())
        return dict(sums)

    key = {"stage": "agreement", "original": recording.model_hash, "kept": recorded["tokens"].shape[-1]}
    return Agreement(**each_batch(context, recording.samples, "agreement", key, rows_of))


def _compared(log_q: Tensor, top: Tensor, log_p: Tensor, rest: Tensor) -> dict[str, Tensor]:
    """Of each token [tokens]: top-1 agreement, acceptance and divergence, all tokens that were not kept being one."""
    log_kept = log_q.gather(1, top).float()
    other = _rest(log_q, top).float()
    variation = ((log_p.exp() - log_kept.exp()).abs().sum(dim=-1) + (rest - other).abs()) / 2
    return {
        "top1": (log_q.argmax(dim=-1) == top[:, 0]).float(),
        "acceptance": 1 - variation,
        "kl": top_divergence(log_p, rest, log_kept, other.log()).clamp_min(0),
    }


def _rest(log_p: Tensor, top: Tensor) -> Tensor:
    """Probability of all tokens but some; summed, not 1 − theirs: small masses survive."""
    return log_p.exp().scatter_(1, top, 0.0).sum(dim=-1)


@torch.no_grad()
def _counted(stack: Stack, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Counted tokens, a few at a time: row, place in the answer, log-probabilities [tokens, vocabulary]."""
    counted = batch.labels != IGNORED
    rows, positions = torch.nonzero(counted, as_tuple=True)
    places = (counted.cumsum(dim=1) - 1)[rows, positions].cpu()
    states = stack.hidden(batch.input_ids)[rows, positions]
    states = states.to(stack.model.get_output_embeddings().weight.device)
    chunk = positions_at_once(stack)
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        yield rows[part].cpu(), places[part], torch.log_softmax(stack.logits(states[part]), dim=-1)
