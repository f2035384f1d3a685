"""Chats as a model reads them: through its tokenizer's template, and which of their tokens count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from excise.data.dates import asks_for_date, dated_template
from excise.data.files import BadRowError
from excise.data.limits import limited, require_interruptible
from excise.data.rows import encodable
from excise.errors import InputError, reading
from excise.plain import Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("a", "b")  # two first messages that differ in their first character
# Characters that a chat template may write, beside ten times what it is given: tokenising takes a second a million.
LONGEST = 1 << 24


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> Any:
    """What a tokenizer makes of a text, as it returns it.

    Raises:
        InputError: it does not work; its files may be anybody's.

    """
    with reading(tokenizer.name_or_path or "the model", "a tokenizer"):
        return tokenizer(text, verbose=False, **options)


def tokenise_chat(
    messages: Sequence[Values], tokenizer: PreTrainedTokenizerBase, loss_on: str, *, last: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them enter the loss; see `excise.data.samples.load_samples`.

    Args:
        messages: turns.
        tokenizer: of the model.
        loss_on: which tokens count.
        last: of the responses, the last alone counts.

    Raises:
        BadRowError: the template refuses the chat, or its responses cannot be located.

    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    special = {"add_special_tokens": not has_template}
    messages, text = _rendered(messages, tokenizer)
    if loss_on != "responses":
        ids = encode(tokenizer, text, **special)["input_ids"]
        uncounted = _opening(ids, messages, tokenizer, special) if has_template and loss_on == "content" else 0
        return ids, [False] * uncounted + [True] * (len(ids) - uncounted)
    spans = list(_response_spans(messages, text, tokenizer, last))
    encoded = encode(tokenizer, text, return_offsets_mapping=True, **special)
    counted = [
        any(start < end and start >= a and end <= b for a, b in spans) for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], counted


def _opening(ids: Sequence[int], messages: Sequence[Values], tokenizer: PreTrainedTokenizerBase, special: Any) -> int:
    """Tokens that every chat of this form begins with: those that stay when its first message says something else.

    The message itself is not searched for: what it says may stand in the opening too.
    """
    for i, message in enumerate(messages):
        probes = [render([*messages[:i], {**message, "content": p}, *messages[i + 1 :]], tokenizer) for p in PROBES]
        if probes[0] != probes[1]:  # a template may leave out a message
            others = [encode(tokenizer, probe, **special)["input_ids"] for probe in probes]
            return sum(1 for _ in itertools.takewhile(lambda t: t[0] == t[1] == t[2], zip(ids, *others, strict=False)))
    return 0


def _rendered(messages: Sequence[Values], tokenizer: PreTrainedTokenizerBase) -> tuple[Sequence[Values], str]:
    """A chat as its template takes it, and the text: templates differ in what a call of a tool has for a content."""
    if all(message["content"] is not None for message in messages):
        return messages, render(messages, tokenizer)
    empty = [{**message, "content": message["content"] or ""} for message in messages]
    try:
        text = render(messages, tokenizer)
    except BadRowError:
        return empty, render(empty, tokenizer)
    plain = render(empty, tokenizer)
    if text != plain and text.replace("None", "") == plain.replace("None", ""):  # it wrote the absence down
        return empty, plain
    return messages, text


def render(
    messages: Sequence[Values], tokenizer: PreTrainedTokenizerBase, prompt: bool = False, **variables: bool
) -> str:
    """The text of a chat; with `prompt`, up to where its next answer begins; `variables` are the template's.

    Raises:
        BadRowError: the template refuses it.
        InputError: the template does not end, or takes or makes too much.

    """
    if not getattr(tokenizer, "chat_template", None):
        text = "\n\n".join(message["content"] or "" for message in messages)
        return text + ("\n\n" if prompt and messages else "")
    try:
        dated = {"chat_template": dated_template(tokenizer)} if asks_for_date(tokenizer) else {}
        require_interruptible(str(tokenizer.chat_template))
        with limited("the model's chat template"):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **dated, **variables
            )
    except InputError:
        raise
    except Exception as error:  # templates raise whatever they like on roles they do not accept
        raise BadRowError(f"the chat template refused it ({type(error).__name__}: {error})") from None
    if len(text) > LONGEST + 10 * sum(len(message["content"] or "") for message in messages):
        raise InputError(
            f"the model's chat template makes {len(text):,} characters of one chat; it is damaged or hostile"
        )
    return encodable(text, "a role or a call of a tool")  # contents have been looked at


def _response_spans(
    messages: Sequence[Values], text: str, tokenizer: PreTrainedTokenizerBase, last: bool
) -> Iterator[tuple[int, int]]:
    """Character spans of assistant turns, or of the last one, found by rendering the chat up to each."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in turns[-1:] if last else turns:
        before, after = render(messages[:i], tokenizer, prompt=True), render(messages[: i + 1], tokenizer)
        if not (text.startswith(before) and text.startswith(after)):
            raise BadRowError("the chat template rewrites earlier turns, so its responses cannot be located")
        yield len(before), len(after)


def prompt_ids(messages: Sequence[Values], tokenizer: PreTrainedTokenizerBase, *, thinking: bool = True) -> list[int]:
    """Token ids of a chat that waits for an answer; without a template, its texts and nothing else.

    Args:
        messages: turns, the last one not the model's.
        tokenizer: the model's.
        thinking: off, templates that know the word ask the model to answer at once.

    Raises:
        BadRowError: the template refuses it.

    """
    variables = {} if thinking else {"enable_thinking": False}
    text = render(messages, tokenizer, prompt=True, **variables)
    # A template writes the special tokens itself.
    added = not getattr(tokenizer, "chat_template", None)
    return list(encode(tokenizer, text, add_special_tokens=added)["input_ids"])
