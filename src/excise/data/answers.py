"""Samples in the model's own words: prompts of a source, continued by the model itself, greedily, each of them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from excise.artefacts import digest, read_json, write_artefact
from excise.data.chats import encode, prompt_ids
from excise.data.files import BadRowError
from excise.data.rows import Row
from excise.errors import InputError
from excise.models.file_hashes import cache_folder
from excise.models.identity import model_identity

if TYPE_CHECKING:
    from excise.models.loading import Loaded

Answer = Callable[[Row, int], Row]

# Of a text that is no chat, the model is given a quarter, within these limits, and goes on from there.
SHORTEST, LONGEST = 8, 64
MOST_TOKENS = 256


def own_answers(loaded: Loaded) -> Answer:
    """How a model continues a row: a chat's last answer is its own, a text goes on in its words.

    Answers are greedy, and kept in the user's cache by model and prompt.

    Args:
        loaded: the model and its tokenizer.

    Returns:
        (row, longest sample in tokens) → the row with the model's words; raises `BadRowError` where it has none.

    """

    def answer(row: Row, tokens: int) -> Row:
        if row.messages is not None:
            asked = list(row.messages)
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            if not asked:
                raise BadRowError("no turn to answer")
            said = _continued(loaded, prompt_ids(asked, loaded.tokenizer), tokens)
            return replace(row, messages=(*asked, {"role": "assistant", "content": said}))
        ids = encode(loaded.tokenizer, row.text or "")["input_ids"]
        prompt = ids[: max(SHORTEST, min(LONGEST, len(ids) // 4))]
        said = _continued(loaded, prompt, tokens)
        return replace(row, text=loaded.tokenizer.decode(prompt, skip_special_tokens=True) + said)

    return answer


def _continued(loaded: Loaded, prompt: list[int], tokens: int) -> str:
    """What the model says after a prompt, up to a sample of `tokens` tokens."""
    room = min(MOST_TOKENS, (tokens or MOST_TOKENS + len(prompt)) - len(prompt))
    if room < 1:
        raise BadRowError(f"a prompt of {len(prompt)} tokens leaves no room for an answer in {tokens}")
    key = {"model_hash": model_identity(loaded.stack.model), "prompt": prompt, "room": room}
    path = cache_folder() / "answers" / f"{digest(key)[:32]}.json"
    said = _known(path, key)
    if said is None:
        said = _generated(loaded, prompt, room)
        write_artefact(path, {**key, "said": said}, durable=False)
    if not said.strip():
        raise BadRowError("the model answers nothing")
    return said


def _known(path: Any, key: dict[str, Any]) -> str | None:
    try:
        kept = read_json(path)
        return str(kept["said"]) if {name: kept[name] for name in key} == key else None
    # Whatever stands there, the model can be asked again.
    except (InputError, KeyError, TypeError):
        return None


def _generated(loaded: Loaded, prompt: list[int], room: int) -> str:
    from excise.models.generation import greedy

    (found,) = greedy(loaded.stack, loaded.tokenizer, [prompt], room)
    return str(loaded.tokenizer.decode(found, skip_special_tokens=True))
