"""Times of blocks, as an artefact: what a request takes, and how much of that each block does. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from excise.artefacts import Artefact
from excise.errors import InputError
from excise.ising.weighing import Weights
from excise.plain import Facts
from excise.settings import LATENCIES


@dataclass(frozen=True)
class Request:
    """What is timed.

    Attributes:
        prompt_tokens: tokens that are read.
        new_tokens: tokens of the answer, 2 or more.
        batch: sequences at once.

    """

    prompt_tokens: int
    new_tokens: int
    batch: int = 1

    def within(self, positions: int | None) -> Request:
        """The same with the prompt shortened to what leaves room for the answer; as it is where there is no bound."""
        # Beyond its positions a model with learned ones fails, and others are not what they were trained for.
        most = self.prompt_tokens if positions is None else positions - self.new_tokens
        return replace(self, prompt_tokens=max(1, min(self.prompt_tokens, most)))


@dataclass(frozen=True)
class Latency:
    """Seconds of a model's two stages of answering.

    Attributes:
        prefill: of reading the whole prompt, and giving the first token.
        decode: of each token after it.

    """

    prefill: float
    decode: float

    def of(self, part: str, new_tokens: int) -> float:
        """Seconds of "prefill", "decode" (one token), or a "request" of so many new tokens."""
        if part == "request":
            return self.prefill + (new_tokens - 1) * self.decode
        return self.prefill if part == "prefill" else self.decode


@dataclass(frozen=True)
class Times(Artefact):
    """How long a model takes for a request, and its blocks.

    Attributes:
        model: as it was named.
        model_hash: its identity.
        request: what is timed.
        whole: of the intact model, seconds.
        kinds: [N], kind of each block; those alike in modules and shapes share one, and its times.
        blocks: [N], what the model is faster by without the block, seconds; 0 of those that cannot be removed.
        turns: how often the request was answered for it.
        error: standard error of the least sure ratio of times.
        engine: what answered, of `excise.settings.ENGINES`.
        machine: what it was measured on.
        provenance: versions, machine, command.

    """

    model: str
    model_hash: str
    request: Request
    whole: Latency
    kinds: tuple[str, ...]
    blocks: tuple[Latency, ...]
    turns: int
    error: float
    engine: str
    machine: Facts
    provenance: Facts

    def of_model(self, model_hash: str) -> Times:
        """The same times, if they are those of that model.

        Raises:
            InputError: they are of another.

        """
        if model_hash != self.model_hash:
            raise InputError(
                f"--times are those of {self.model} (hash {self.model_hash[:12]}), expected the model that is pruned "
                f"(hash {model_hash[:12]}); run `excise times` on that one"
            )
        return self

    def weights(self, part: str) -> Weights:
        """What blocks take of a part of the request, milliseconds; a share is one of all it takes.

        Args:
            part: "request", "prefill", or "decode", of one token.

        """
        units = tuple(1000 * block.of(part, self.request.new_tokens) for block in self.blocks)
        return Weights(units, 1000 * self.whole.of(part, self.request.new_tokens))

    def without(self, removed: Iterable[int]) -> Latency:
        """What the model will take without these blocks, seconds."""
        gone = [self.blocks[i] for i in removed]
        return Latency(
            self.whole.prefill - sum(block.prefill for block in gone),
            self.whole.decode - sum(block.decode for block in gone),
        )

    def speedups(self, smaller: Latency) -> dict[str, float]:
        """How many times as fast as the intact model: part → ratio of times."""
        tokens = self.request.new_tokens
        return {part: self.whole.of(part, tokens) / smaller.of(part, tokens) for part in LATENCIES}
