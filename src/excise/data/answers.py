"""Samples in the model's own words: prompts of a source, continued by the model itself, each of them once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from excise.artefacts import digest, read_json, write_artefact
from excise.data.chats import encode, prompt_ids
from excise.data.files import BadRowError
from excise.data.rows import Row
from excise.errors import InputError
from excise.models.file_hashes import cache_folder
from excise.models.identity import model_identity
from excise.plain import Values

if TYPE_CHECKING:
    from excise.models.loading import Loaded

# Of a text that is no chat, the model is given a quarter, within these limits and those of half a sample, and goes on.
SHORTEST, LONGEST = 8, 64
MOST_TOKENS = 256


class Answer(Protocol):
    """How a model continues a row: a chat's last answer is its own, a text goes on in its words."""

    def __call__(self, row: Row, tokens: int, temperature: float = 0.0, seed: int = 0) -> Row:
        """The row with the model's words.

        Args:
            row: the prompt, with or without an answer of somebody else's.
            tokens: longest sample, in tokens; 0 for no limit.
            temperature: of the distributions that tokens are sampled from; 0 takes the most probable.
            seed: of the sampling.

        Raises:
            BadRowError: there is nothing to answer, no room for it, or no answer.

        """


def own_answers(loaded: Loaded) -> Answer:
    """Answers of a model, kept in the user's cache by model and prompt, and by temperature and seed if sampled.

    Args:
        loaded: the model and its tokenizer.

    """

    def answer(row: Row, tokens: int, temperature: float = 0.0, seed: int = 0) -> Row:
        # A greedy answer is the same whatever the seed.
        sampling = {"temperature": temperature, "seed": seed} if temperature else {}
        if row.messages is not None:
            asked = list(row.messages)
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            if not asked:
                raise BadRowError("no turn to answer")
            said = _continued(loaded, prompt_ids(asked, loaded.tokenizer), tokens, sampling)
            return replace(row, messages=(*asked, {"role": "assistant", "content": said}))
        ids = encode(loaded.tokenizer, row.text or "")["input_ids"]
        longest = min(LONGEST, tokens // 2) if tokens else LONGEST
        prompt = ids[: min(longest, max(SHORTEST, len(ids) // 4))]
        said = _continued(loaded, prompt, tokens, sampling)
        return replace(row, text=loaded.tokenizer.decode(prompt, skip_special_tokens=True) + said)

    return answer


def _continued(loaded: Loaded, prompt: list[int], tokens: int, sampling: Values) -> str:
    """What the model says after a prompt, up to a sample of `tokens` tokens."""
    room = min(MOST_TOKENS, (tokens or MOST_TOKENS + len(prompt)) - len(prompt))
    if room < 1:
        raise BadRowError(f"a prompt of {len(prompt)} tokens leaves no room for an answer in {tokens}")
    key = {"model_hash": model_identity(loaded.stack.model), "prompt": prompt, "room": room, **sampling}
    path = cache_folder() / "answers" / f"{digest(key)[:32]}.json"
    said = _known(path, key)
    if said is None:
        said = _generated(loaded, prompt, room, sampling)
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


def _generated(loaded: Loaded, prompt: list[int], room: int, sampling: Values) -> str:
    from excise.models.generation import greedy, sampled

    asked = (loaded.stack, loaded.tokenizer, [prompt], room)
    (found,) = sampled(*asked, **sampling) if sampling else greedy(*asked)
    return str(loaded.tokenizer.decode(found, skip_special_tokens=True))
