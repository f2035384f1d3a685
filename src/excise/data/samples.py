"""Tokenised samples: which tokens there are, and which of them count in the loss."""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import numpy as np

from excise.data.sources import Row, draw_rows
from excise.errors import InputError
from excise.settings import LOSS_ON

DEFAULT_TOKENS = 512


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised sample.

    Attributes:
        name: where it came from, for messages.
        input_ids: [tokens], int64.
        counted: [tokens], bool; token t+1 enters the loss (as a target) where `counted[t+1]`.
        category: the row's category, where the source gives one.
        window: first token and end of a piece of a longer text; None for a sample that is whole.

    """

    name: str
    input_ids: np.ndarray
    counted: np.ndarray
    category: str | None = None
    window: tuple[int, int] | None = None

    @property
    def targets(self) -> int:
        """Number of tokens that enter the loss."""
        return int(self.counted[1:].sum())

    @property
    def source(self) -> str:
        """What it is a sample of: the row, or the text that it is a piece of."""
        return self.name if self.window is None else self.name.rpartition("[")[0]


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """A sequence of samples and what is needed to draw them again."""

    items: tuple[Sample, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.items[index], {**self.provenance, "slice": [index.start, index.stop, index.step]})
        return self.items[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.items)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(len(sample.input_ids) for sample in self.items)

    def first_tokens(self, tokens: int) -> Samples:
        """The first samples, up to the one with which they have `tokens` tokens together; all where they have fewer."""
        total = 0
        for count, sample in enumerate(self.items, start=1):
            total += len(sample.input_ids)
            if total >= tokens:
                return self[:count]
        return self

    def apart_from(self, others: Samples) -> Samples:
        """Leave out the samples that are among others, or overlap with one of them in the text they are pieces of."""
        taken: dict[str, list[tuple[float, float]]] = {}
        for other in others:
            taken.setdefault(other.source, []).append(other.window or (0, math.inf))

        def overlaps(sample: Sample) -> bool:
            start, end = sample.window or (0, math.inf)
            return any(start < e and s < end for s, e in taken.get(sample.source, ()))

        kept = tuple(sample for sample in self.items if not overlaps(sample))
        return Samples(kept, {**self.provenance, "left_out": len(self) - len(kept)})

    @property
    def hash(self) -> str:
        """SHA-256 over all token ids and loss masks."""
        digest = hashlib.sha256()
        for sample in self.items:
            digest.update(
                np.ascontiguousarray(sample.input_ids, dtype="<i8").tobytes() + sample.counted.tobytes() + b"|"
            )
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Facts for provenance."""
        return {**self.provenance, "samples": len(self), "total_tokens": self.tokens, "hash": self.hash}


def load_samples(
    data: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    loss_on: str = "content",
) -> Samples:
    """Draw and tokenise samples.

    Chats go through the tokenizer's chat template where it has one, else their turns are joined by blank lines. A text
    file is cut into windows of `tokens` tokens, of which a seeded draw is taken.

    Args:
        data: see `excise.data.sources.draw_rows`.
        tokenizer: of the model.
        samples: number wanted; fewer come where the source has fewer.
        tokens: longest sample, in tokens; longer ones are cut; 0 for no limit (windows of text are then 2,048 long).
        seed: of the draw.
        loss_on: `all` counts every token after the first (as the paper does); `content` all but what the chat template
            puts before a chat's first message, which is the same for every chat; `responses` only assistant turns.

    Raises:
        InputError: an option is out of range, or not one usable sample comes out.

    """
    if samples < 1 or tokens < 0 or loss_on not in LOSS_ON:
        raise InputError(
            f"expected samples >= 1, tokens >= 0 and loss_on in {LOSS_ON}, got {samples}, {tokens}, {loss_on!r}"
        )
    source = draw_rows(data, samples, seed)
    tokenised: list[Sample] = []
    skipped: list[str] = []
    for row in source.rows:
        if row.text is not None and source.is_text_file and loss_on != "responses":
            tokenised += _windows(row, tokenizer, tokens or 2048, samples, seed)
            continue
        try:
            sample = _tokenise(row, tokenizer, tokens, loss_on)
        except _UnusableError as reason:
            skipped.append(f"{row.name}: {reason}")
            continue
        tokenised.append(sample)
    if not tokenised:
        reasons = "; ".join(skipped[:3]) or "the source holds no rows"
        raise InputError(
            f"no usable samples in '{data}': {reasons}. A sample needs two tokens and one that counts in the loss"
        )
    template = getattr(tokenizer, "chat_template", None)
    provenance = {
        **source.provenance,
        "tokens": tokens,
        "loss_on": loss_on,
        "chat_template_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
        "unusable": skipped,
    }
    return Samples(tuple(tokenised), provenance)


def split_samples(
    data: str,
    tokenizer: Any,
    *,
    samples: int,
    held_out: int,
    held_out_data: str | None = None,
    held_out_tokens: int | None = None,
    tokens: int,
    seed: int,
    loss_on: str,
) -> tuple[Samples, Samples]:
    """Calibration samples, and others kept apart to measure damage on.

    From one source both come from one draw, so no sample is in both. Where the source has too few, a fifth of what
    there is is kept apart.

    Args:
        data: source of the calibration samples (see `load_samples`).
        tokenizer: of the model.
        samples: calibration samples wanted.
        held_out: held-out samples wanted.
        held_out_data: their own source, if not `data`.
        held_out_tokens: longest of those, if they have their own source and not the length of the others.
        tokens: longest sample.
        seed: of the draws.
        loss_on: tokens that count.

    Raises:
        InputError: too few samples for both.

    """
    if held_out_data is not None:
        draw = partial(load_samples, tokenizer=tokenizer, seed=seed, loss_on=loss_on)
        longest = tokens if held_out_tokens is None else held_out_tokens
        return draw(data, samples=samples, tokens=tokens), draw(held_out_data, samples=held_out, tokens=longest)
    if held_out_tokens is not None:
        raise InputError("a length of their own needs a source of their own: give held-out samples both or neither")
    drawn = load_samples(data, tokenizer, samples=samples + held_out, tokens=tokens, seed=seed, loss_on=loss_on)
    if len(drawn) < 2:
        raise InputError(
            f"'{data}' gives one usable sample; expected at least two, one to calibrate and one to measure on"
        )
    if len(drawn) < samples + held_out:
        held_out = min(held_out, max(1, len(drawn) // 5))
        warnings.warn(
            f"'{data}' gives {len(drawn)} usable samples: {len(drawn) - held_out} to calibrate, {held_out} held out",
            stacklevel=2,
        )
    return drawn[: len(drawn) - held_out], drawn[len(drawn) - held_out :]


class _UnusableError(Exception):
    """A row gives no sample; the reason is its message."""


def _tokenise(row: Row, tokenizer: Any, tokens: int, loss_on: str) -> Sample:
    if row.text is not None:
        if loss_on == "responses":
            raise _UnusableError("plain text has no responses (use --loss-on all)")
        ids = tokenizer(row.text, verbose=False)["input_ids"]
        counted = [True] * len(ids)
    else:
        ids, counted = _tokenise_chat(row.messages or (), tokenizer, loss_on)
    limit = tokens or len(ids)
    sample = Sample(
        row.name, np.array(ids[:limit], dtype=np.int64), np.array(counted[:limit], dtype=bool), row.category
    )
    if len(sample.input_ids) < 2 or sample.targets == 0:
        raise _UnusableError(f"{len(sample.input_ids)} tokens, {sample.targets} of them counted in the loss")
    return sample


def _tokenise_chat(messages: Sequence[Mapping[str, str]], tokenizer: Any, loss_on: str) -> tuple[list[int], list[bool]]:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    text = _render(messages, tokenizer)
    special = {"add_special_tokens": not has_template, "verbose": False}
    if loss_on != "responses":
        ids = tokenizer(text, **special)["input_ids"]
        first = messages[0]["content"].strip() if messages else ""
        opening = text[: max(0, text.find(first))] if loss_on == "content" else ""
        uncounted = min(len(ids), len(tokenizer(opening, **special)["input_ids"])) if has_template and opening else 0
        return ids, [False] * uncounted + [True] * (len(ids) - uncounted)
    spans = list(_response_spans(messages, text, tokenizer))
    encoded = tokenizer(text, return_offsets_mapping=True, **special)
    counted = [
        any(start < end and start >= a and end <= b for a, b in spans) for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], counted


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any, prompt: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages) + ("\n\n" if prompt and messages else "")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # templates raise whatever they like on roles they do not accept
        raise _UnusableError(f"the chat template refused it ({type(error).__name__}: {error})") from None


def _response_spans(messages: Sequence[Mapping[str, str]], text: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Character spans of assistant turns, found by rendering the chat up to each."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _render(messages[:i], tokenizer, prompt=True), _render(messages[: i + 1], tokenizer)
        if not (text.startswith(before) and text.startswith(after)):
            raise _UnusableError("the chat template rewrites earlier turns, so its responses cannot be located")
        yield len(before), len(after)


def _windows(row: Row, tokenizer: Any, width: int, count: int, seed: int) -> list[Sample]:
    ids = tokenizer(row.text, verbose=False)["input_ids"]
    starts = list(range(0, max(1, len(ids) - width + 1), width))
    random.Random(seed).shuffle(starts)
    windows = []
    for start in starts[:count]:
        piece = np.array(ids[start : start + width], dtype=np.int64)
        if len(piece) >= 2:
            span, counted = (start, start + len(piece)), np.ones(len(piece), dtype=bool)
            windows.append(Sample(f"{row.name}[{span[0]}:{span[1]}]", piece, counted, window=span))
    return windows
