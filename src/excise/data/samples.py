"""Tokenised samples: which tokens there are, and which of them count in the loss."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack, overload

import numpy as np
from jaxtyping import Bool, Int64

from excise.data.answers import Answer
from excise.data.chats import encode, tokenise_chat
from excise.data.dates import TEMPLATE_DATE, asks_for_date
from excise.data.files import BadRowError
from excise.data.fit import Fit
from excise.data.rows import Row
from excise.data.sources import TOLD, Place, Prompts, Skipped, Source, draw_rows, names_of, places_of, prompts_of
from excise.errors import InputError
from excise.plain import Facts, Values
from excise.settings import LOSS_ON

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TOKENS = 512
# Rows in succession without a sample after which a draw ends: a stream from the hub may go on for ever.
PATIENCE = 10_000


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised sample.

    Attributes:
        name: where it came from, for messages.
        input_ids: [tokens], int64.
        counted: [tokens], bool; token t+1 enters the loss (as a target) where `counted[t+1]`.
        category: the row's category, where the source gives one; of a mixture, else the name of its source.
        window: first token and end of a piece of a longer text; None for a sample that is whole.
        place: number of its source in a mixture.

    """

    name: str
    input_ids: Int64[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    category: str | None = None
    window: tuple[int, int] | None = None
    place: int = 0

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
    provenance: Values = field(default_factory=dict)

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

    @property
    def domains(self) -> tuple[str, ...]:
        """Category of each sample; "" where it has none."""
        return tuple(sample.category or "" for sample in self.items)

    def first_tokens(self, tokens: int) -> Samples:
        """The first samples, up to the one with which they have `tokens` tokens together; all where they have fewer."""
        total = 0
        for count, sample in enumerate(self.items, start=1):
            total += len(sample.input_ids)
            if total >= tokens:
                return self[:count]
        return self

    def picked(self, of: int, picks: Collection[int]) -> frozenset[int]:
        """Numbers of the samples that `dealt` picks."""
        # Samples of several kinds and sources may take turns, and every second one be of the same.
        order = sorted(range(len(self)), key=lambda i: (self.items[i].category or "", self.items[i].place))
        return frozenset(i for place, i in enumerate(order) if place % of in picks)

    def dealt(self, of: int, picks: Collection[int]) -> tuple[Samples, Samples]:
        """Deal samples out, of every category and source alike: of each `of` those numbered in `picks`, and the others.

        Examples:
            >>> ids, ones = np.arange(2), np.ones(2, dtype=bool)
            >>> samples = Samples(tuple(Sample(name, ids, ones, name[0]) for name in ("a1", "b1", "a2", "b2")))
            >>> [[sample.name for sample in part] for part in samples.dealt(2, [0])]
            [['a1', 'b1'], ['a2', 'b2']]

        """
        picked = self.picked(of, picks)
        parts = ([s for i, s in enumerate(self) if (i in picked) == wanted] for wanted in (True, False))
        first, second = (
            Samples(tuple(part), {**self.provenance, "dealt": [of, sorted(picks), name]})
            for part, name in zip(parts, ("picked", "others"), strict=True)
        )
        return first, second

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

    def describe(self) -> Facts:
        """Facts for provenance."""
        return {**self.provenance, "samples": len(self), "total_tokens": self.tokens, "hash": self.hash}


def load_samples(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    loss_on: str = "content",
    fit: Fit | None = None,
    own: Answer | None = None,
) -> Samples:
    """Draw and tokenise samples.

    Chats go through the tokenizer's chat template where it has one, else their turns are joined by blank lines; a
    template that asks for today's date gets `TEMPLATE_DATE`. A text file is cut into windows of `tokens` tokens, of
    which a seeded draw is taken; each begins as the tokenizer begins a text. Rows that give no sample are skipped,
    counted and warned of, and others drawn in their place.

    Args:
        data: see `excise.data.sources.draw_rows`; several sources with commas between them are mixed, in equal shares
            of the samples (not of tokens) or as `a.jsonl:3,b.txt:1` says (see `excise.data.sources.places_of`).
        tokenizer: of the model.
        samples: number wanted; fewer come where the source has fewer.
        tokens: longest sample, in tokens; longer ones are cut; 0 for no limit (windows of text are then 2,048 long).
        seed: of the draw.
        loss_on: `all` counts every token after the first (as the paper does); `content` all but what the chat template
            puts before a chat's first message, which is the same for every chat; `responses` only assistant turns, and
            of chats that the model answers only its own.
        fit: what the model can take; longer samples are cut to it, others that do not fit are skipped.
        own: how the model continues prompts, for the sources that `excise.data.sources.prompts_of` names.

    Raises:
        InputError: an option is out of range, a source gives not one usable sample, or `self` is asked for without a
            model.

    """
    if samples < 1 or tokens < 0 or loss_on not in LOSS_ON:
        raise InputError(
            f"expected samples >= 1, tokens >= 0 and loss_on in {LOSS_ON}, got {samples}, {tokens}, {loss_on!r}"
        )
    if tokenizer is None:
        raise InputError("the model comes without a tokenizer, so no text can be read; put its files with it")
    places = places_of(data)
    draws = [
        _drawn(place.data, tokenizer, _share_of(samples, place), tokens, seed, loss_on, fit, own) for place in places
    ]
    skipped = Skipped(
        sum(draw.skipped.rows for draw in draws), [r for draw in draws for r in draw.skipped.first][:TOLD]
    )
    if empty := next((place.data for place, draw in zip(places, draws, strict=True) if not draw.items), None):
        reasons = "; ".join(skipped.first[:3]) or "the source holds no rows"
        raise InputError(
            f"no usable samples in '{empty}': {reasons}. A sample needs two tokens and one that counts in the loss"
        )
    if skipped.rows:
        warnings.warn(f"{skipped.rows} rows of '{data}' were skipped, such as {skipped.first[0]}", stacklevel=2)
    if len(places) > 1:
        draws = _named(draws, places)
    items = _mixed([draw.items for draw in draws], places, samples)
    template = getattr(tokenizer, "chat_template", None)
    facts: Facts = (
        draws[0].provenance
        if len(places) == 1
        else {
            "data": data,
            "seed": seed,
            "sources": [{**draw.provenance, "share": place.share} for place, draw in zip(places, draws, strict=True)],
        }
    )
    provenance = {
        **facts,
        "tokens": tokens,
        "loss_on": loss_on,
        "chat_template_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
        "skipped": {"rows": skipped.rows, "first": skipped.first},
    }
    if asks_for_date(tokenizer):
        provenance["template_date"] = TEMPLATE_DATE.isoformat()
    return Samples(tuple(items), provenance)


def _share_of(samples: int, place: Place) -> int:
    """Samples to draw of one place; exact where it has the whole share, which a float of the largest number is not."""
    return samples if place.share == 1 else math.ceil(samples * place.share)


@dataclass(frozen=True, eq=False)
class _Draw:
    items: list[Sample]
    skipped: Skipped
    provenance: Facts


def _drawn(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    seed: int,
    loss_on: str,
    fit: Fit | None,
    own: Answer | None,
) -> _Draw:
    """Samples of one place."""
    prompts = prompts_of(data)
    if prompts is not None and own is None:
        raise InputError(f"'{data}' are the model's own words, and there is no model to ask here; name other data")
    source = draw_rows(data if prompts is None else prompts.data, count, seed)
    items: list[Sample] = []
    if fit is not None and fit.positions is not None:
        tokens = min(tokens or fit.positions, fit.positions)
    answer = (
        None
        if own is None or prompts is None
        else partial(own, tokens=tokens, temperature=prompts.temperature, seed=seed)
    )
    futile = 0
    for piece in _pieces(source, tokenizer, 0 if loss_on == "responses" else tokens or 2048, seed):
        try:
            sample = _sample(piece, tokenizer, tokens, loss_on, answer)
            if fit is not None and (refusal := fit.refusal(sample.input_ids)):
                raise BadRowError(refusal)
        except BadRowError as reason:
            source.skipped.add(piece.row.name, reason)
            futile += 1
        else:
            items.append(sample)
            futile = 0
        # Before another row is asked for, which may read the whole source again.
        if len(items) == count or futile == max(count, PATIENCE):
            break
    return _Draw(items, source.skipped, {**source.provenance, **_answered(prompts)})


def _answered(prompts: Prompts | None) -> Facts:
    """Facts of answers, for provenance; the seed of the sampling is that of the draw."""
    if prompts is None:
        return {}
    return {"answers": "own"} | ({"temperature": prompts.temperature} if prompts.temperature else {})


def _named(draws: Sequence[_Draw], places: Sequence[Place]) -> list[_Draw]:
    """Samples that know their source, and are of a category of its name where they have none."""
    known = {sample.category for draw in draws for sample in draw.items if sample.category is not None}
    named = enumerate(zip(draws, names_of(places, known), strict=True))
    return [
        replace(draw, items=[replace(s, category=s.category or name, place=place) for s in draw.items])
        for place, (draw, name) in named
    ]


def _mixed(draws: Sequence[Sequence[Sample]], places: Sequence[Place], samples: int) -> list[Sample]:
    """Samples of several sources in their shares, sources and categories evenly spread: each part of the list is alike.

    Where a source has too few for its share, the whole is smaller, and the shares stay.
    """
    most = min(len(items) / place.share for items, place in zip(draws, places, strict=True))
    total = min(samples, math.floor(most + 1e-9))
    if total < samples < sys.maxsize and len(places) > 1:
        short = min(zip(places, draws, strict=True), key=lambda pair: len(pair[1]) / pair[0].share)[0]
        warnings.warn(
            f"'{short.data}' has too few samples for its share of {samples}; {total} are drawn, in the shares given",
            stacklevel=3,
        )
    counts = [math.floor(total * place.share + 1e-9) for place in places]
    rests = sorted(range(len(places)), key=lambda i: (counts[i] - total * places[i].share, i))
    for i in rests[: total - sum(counts)]:
        counts[i] += len(draws[i]) > counts[i]
    kinds: dict[tuple[int, str], list[tuple[int, Sample]]] = {}
    for source, (items, count) in enumerate(zip(draws, counts, strict=True)):
        for place, sample in enumerate(items[:count]):
            kinds.setdefault((source, sample.category or ""), []).append((place, sample))
    # Ties go by the draw and not by name: where every sample is a category of its own, the order stays that drawn.
    placed = [
        ((number + 0.5) / len(members), source, place, sample)
        for (source, _), members in kinds.items()
        for number, (place, sample) in enumerate(members)
    ]
    return [sample for *_, sample in sorted(placed, key=lambda entry: entry[:3])]


class Drawing(TypedDict):
    """How samples are drawn, see `load_samples`."""

    samples: int
    tokens: int
    seed: int
    loss_on: str


def split_samples(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: int,
    held_out_data: str | None = None,
    held_out_tokens: int | None = None,
    fit: Fit | None = None,
    own: Answer | None = None,
    **drawing: Unpack[Drawing],
) -> tuple[Samples, Samples]:
    """Calibration samples, and others kept apart to measure damage on.

    From one source both come from one draw, so no sample is in both. Where the source has too few, each gets its share
    of what there is.

    Args:
        data: source of the calibration samples (see `load_samples`).
        tokenizer: of the model.
        held_out: held-out samples wanted.
        held_out_data: their own source, if not `data`.
        held_out_tokens: longest of those, if they have their own source and not the length of the others.
        fit: what the model can take.
        own: how the model continues prompts, for the source `self`.
        drawing: as for `load_samples`; `samples` are those for calibration.

    Raises:
        InputError: too few samples for both.

    """
    samples = drawing["samples"]
    if held_out_data is not None:
        longest = drawing["tokens"] if held_out_tokens is None else held_out_tokens
        apart: Drawing = {**drawing, "samples": held_out, "tokens": longest}
        return load_samples(data, tokenizer, fit=fit, own=own, **drawing), load_samples(
            held_out_data, tokenizer, fit=fit, own=own, **apart
        )
    if held_out_tokens is not None:
        raise InputError("a length of their own needs a source of their own: give held-out samples both or neither")
    both: Drawing = {**drawing, "samples": samples + held_out}
    drawn = load_samples(data, tokenizer, fit=fit, own=own, **both)
    if len(drawn) < 2:
        raise InputError(
            f"'{data}' gives one usable sample; expected at least two, one to calibrate and one to measure on"
        )
    if len(drawn) < (wanted := both["samples"]):
        held_out = min(max(1, round(len(drawn) * held_out / wanted)), len(drawn) - 1)
        warnings.warn(
            f"'{data}' gives {len(drawn)} of the {wanted} samples wanted: {len(drawn) - held_out} to calibrate, "
            f"{held_out} held out",
            stacklevel=2,
        )
    return drawn[: len(drawn) - held_out], drawn[len(drawn) - held_out :]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A row; of a text file one of its windows, with the ids and its place in the text."""

    row: Row
    ids: Sequence[int] = ()
    window: tuple[int, int] | None = None


def _pieces(source: Source, tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> Iterator[_Piece]:
    """What samples are made of, in the order of the draw; `width`: tokens of a text's windows, 0 to leave it whole."""
    if not source.is_text_file or not width:
        yield from map(_Piece, itertools.chain(source.rows, source.further))
        return
    (row,) = source.rows
    whole = windows_of(row.text or "", tokenizer, width)
    windows = [window for window in whole if len(window[1]) == width] or whole[:1]
    random.Random(seed).shuffle(windows)
    first = len(beginning(tokenizer))
    for start, ids in windows:
        span = (start, start + len(ids) - first)
        yield _Piece(replace(row, name=f"{row.name}[{span[0]}:{span[1]}]"), ids, span)


def _sample(
    piece: _Piece,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    loss_on: str,
    answer: Callable[[Row], Row] | None,
) -> Sample:
    """The sample of a piece, or of how the model goes on with it.

    Raises:
        BadRowError: nothing in it counts, or the row cannot be read.

    """
    row = piece.row
    if row.text is not None and loss_on == "responses":
        raise BadRowError("plain text has no responses (use --loss-on all)")
    if answer is not None:
        if piece.window is not None:
            row = replace(row, text=tokenizer.decode(piece.ids, skip_special_tokens=True))
        ids, counted = _tokenise(answer(row), tokenizer, loss_on, last=True)
    elif piece.window is not None:
        ids, counted = piece.ids, [True] * len(piece.ids)
    else:
        ids, counted = _tokenise(row, tokenizer, loss_on)
    limit = tokens or len(ids)
    sample = Sample(
        row.name,
        np.array(ids[:limit], dtype=np.int64),
        np.array(counted[:limit], dtype=bool),
        row.category,
        piece.window,
    )
    if len(sample.input_ids) < 2 or sample.targets == 0:
        raise BadRowError(f"{len(sample.input_ids)} tokens, {sample.targets} of them counted in the loss")
    return sample


def _tokenise(
    row: Row, tokenizer: PreTrainedTokenizerBase, loss_on: str, *, last: bool = False
) -> tuple[Sequence[int], Sequence[bool]]:
    if row.text is not None:
        ids = encode(tokenizer, row.text)["input_ids"]
        return ids, [True] * len(ids)
    return tokenise_chat(row.messages or (), tokenizer, loss_on, last=last)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that a tokenizer puts before every text, such as the one for the beginning of a text; mostly one or none.

    Models that were trained with such a token make nothing of a text without it.
    """
    plain, whole = (encode(tokenizer, "a", add_special_tokens=added)["input_ids"] for added in (False, True))
    places = range(len(whole) - len(plain) + 1)
    return list(whole[: next((i for i in places if whole[i : i + len(plain)] == plain), 0)])


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, width: int) -> list[tuple[int, list[int]]]:
    """A text's tokens in windows that do not overlap, each begun as the tokenizer begins a text.

    Args:
        text: as one piece.
        tokenizer: of the model.
        width: tokens of a window, its beginning counted.

    Returns:
        For each window the place of its first token in the text, and its ids; the last may be shorter.

    """
    first = beginning(tokenizer)
    ids = encode(tokenizer, text)["input_ids"][len(first) :]
    step = max(1, width - len(first))
    return [(start, [*first, *ids[start : start + step]]) for start in range(0, len(ids), step)]
