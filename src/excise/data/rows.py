"""One row of data: a chat or a text, whatever of the known forms it comes in, and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from excise.data.files import BadRowError
from excise.plain import Plain, Values

FORMATS = "`messages`, `conversations` (ShareGPT), `prompt`/`response`, or `text`"
ROLES = {"human": "user", "gpt": "assistant", "function": "tool"}  # of ShareGPT, and of tools' older interface


@dataclass(frozen=True)
class Row:
    """One row of a source: `messages` for a chat, else `text`.

    Attributes:
        name: where it stands in the source, for error messages (`data.jsonl:17`).
        messages: turns as chat templates take them, {"role", "content"} and what else they say (tool calls); or None.
        text: plain text, or None.
        category: the row's own `category`, where it has one.

    """

    name: str
    messages: tuple[Values, ...] | None = None
    text: str | None = None
    category: str | None = None


def row_of(record: Values, name: str) -> Row:
    """Read one JSON object as a row.

    Contents in parts become their text; tool calls stay, their arguments parsed; a call without content has None.

    Raises:
        BadRowError: none of the known forms, or a field that cannot be what it should; says which.

    Examples:
        >>> row_of({"conversations": [{"from": "human", "value": "Hi"}]}, "a:1").messages
        ({'role': 'user', 'content': 'Hi'},)

    """
    category = text_of(record["category"], "`category`") if isinstance(record.get("category"), str) else None
    for key in ("messages", "conversations"):
        if (turns := record.get(key)) is not None:
            return Row(name, messages=_chat(turns, key), category=category)
    if record.get("prompt") is not None and record.get("response") is not None:
        texts = [text_of(record[key], f"`{key}`") for key in ("prompt", "response")]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        return Row(name, messages=tuple(turns), category=category)
    if record.get("text") is not None:
        return Row(name, text=text_of(record["text"], "`text`"), category=category)
    empty = [key for key in ("messages", "conversations", "prompt", "response", "text") if key in record]
    if empty and all(record[key] is None for key in empty):
        raise BadRowError(f"{' and '.join(f'`{key}`' for key in empty)} is null; expected {FORMATS}")
    raise BadRowError(f"expected {FORMATS}, got keys {sorted(map(str, record))}; rename the fields of your data")


def _chat(turns: Plain, key: str) -> tuple[Values, ...]:
    if isinstance(turns, str):  # tables without nested types keep a chat as JSON
        try:
            turns = json.loads(turns)
        except ValueError:
            raise BadRowError(f"`{key}` is text and not JSON; expected a list of turns") from None
    if isinstance(turns, Mapping) and turns and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, turn, strict=False)) for turn in zip(*turns.values(), strict=False)]
    if not isinstance(turns, Sequence):
        raise BadRowError(f"`{key}` must be a list of turns, got {type(turns).__name__}")
    if not turns:
        raise BadRowError(f"`{key}` is empty; expected at least one turn")
    return tuple(_turn(turn, f"turn {number} of `{key}`") for number, turn in enumerate(turns, start=1))


def _turn(turn: Plain, place: str) -> Values:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{place} must be an object, got {type(turn).__name__}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    given = {key: value for key, value in turn.items() if value is not None}  # columns fill up with null
    if not isinstance(given.get(role_key), str):
        raise BadRowError(f"{place} needs a text '{role_key}' beside '{content_key}', got {_told(turn, role_key)}")
    role = ROLES.get(given.pop(role_key), turn[role_key])
    if "function_call" in given:  # the older interface: one call, and no list
        given["tool_calls"] = [{"type": "function", "function": given.pop("function_call")}]
    calls = given.get("tool_calls") or ()
    if calls:
        given["tool_calls"] = [_call(call) for call in calls]
    content = given.pop(content_key, None)
    if content is None and not calls and not given.get("reasoning_content"):
        raise BadRowError(f"{place} ({role}) needs '{content_key}' or tool calls, got {_told(turn, content_key)}")
    text = None if content is None else text_of(content, f"'{content_key}' of {place}")
    return {"role": role, "content": text, **given}


def _call(call: Plain) -> Plain:
    """A tool call as templates take it: arguments as an object, not as the JSON that interfaces send."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def text_of(value: Plain, place: str) -> str:
    """Text, or the texts of a list of parts, such as [{"type": "text", "text": "Hi"}]; `place` is for messages.

    A byte order mark at its beginning, which readers of tables and of folders of text leave there, is no text.

    Raises:
        BadRowError: it is something else, or no text that can be encoded.

    """
    if isinstance(value, list):
        value = "".join(_part(part, place) for part in value)
    if not isinstance(value, str):
        raise BadRowError(f"{place} must be text, got {type(value).__name__}")
    return encodable(value, place).removeprefix("\ufeff")


def encodable(text: str, place: str) -> str:
    """The text itself.

    Raises:
        BadRowError: it holds half a surrogate pair, which JSON can say and tokenizers cannot take.

    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{place} holds half a surrogate pair, which is no character") from None
    return text


def _part(part: Plain, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRowError(f"{place} has a part of type {kind}; expected parts of text")


def _told(turn: Values, key: str) -> str:
    return f"keys {sorted(map(str, turn))}" if key not in turn else f"'{key}': {json.dumps(turn[key], default=str)}"
