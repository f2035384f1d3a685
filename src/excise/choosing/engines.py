"""Programs that answer a request without some blocks, in turns: transformers, in memory, and llama.cpp, of GGUF files.

What disturbs a machine disturbs neighbours in time alike: ratios of times within a turn are steadier than times.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from excise.errors import InputError
from excise.evaluation.llama_cpp import Server, llama_cpp_machine, require_llama_cpp
from excise.evaluation.speed import machine, next_token, random_prompt, read_prompt
from excise.ising.problem import Removal
from excise.ising.times import Request
from excise.models.loading import Loaded
from excise.models.residency import is_offloaded
from excise.models.stack import Stack
from excise.plain import Facts
from excise.surgery.checkpoint import pruned
from excise.surgery.gguf import prune_gguf

# Turns at least; then as many as make the ratios of times so sure, or fill so many seconds.
FEWEST, SURE, LONGEST = 5, 0.005, 60.0

Seconds = Float64[np.ndarray, "times removals"]
Turn = tuple[list[float], list[list[float]]]


class Engine(Protocol):
    """What answers requests."""

    @property
    def machine(self) -> Facts:
        """What its speed depends on beside the model."""

    def in_turns(self, removals: Sequence[Removal], request: Request) -> tuple[Seconds, Seconds]:
        """Answer a request without each of `removals`, () for the whole model, in turns after one to warm up.

        Returns:
            Seconds [times, removals] of the prefill, and of a token decoded after it.

        """


@dataclass(frozen=True, eq=False)
class InTransformers:
    """The model in memory, token by token in turns.

    Attributes:
        stack: the model.

    Raises:
        InputError: the model is streamed from the disk.

    """

    stack: Stack

    def __post_init__(self) -> None:
        if any(is_offloaded(block.module) for block in self.stack.blocks):
            raise InputError(
                "a streamed model takes as long as its disk; time its blocks where it fits in memory (`excise times`), "
                "and give --times FILE"
            )

    @property
    def machine(self) -> Facts:
        """Device, threads and versions."""
        return machine(self.stack.device)

    def in_turns(self, removals: Sequence[Removal], request: Request) -> tuple[Seconds, Seconds]:
        """As `Engine` says; a time of decoding is that of one token.

        Raises:
            ArchitectureError: no config describes what a removal leaves.

        """
        prompt = random_prompt(self.stack.model, request)

        def turn() -> Turn:
            answers = []
            for removed in removals:
                with pruned(self.stack, removed) as model:
                    answers.append(read_prompt(model, prompt))
            reading, writing = [answer.seconds for answer in answers], []
            for _ in range(request.new_tokens - 1):
                for place, removed in enumerate(removals):
                    with pruned(self.stack, removed) as model:
                        answers[place] = next_token(model, answers[place])
                writing.append([answer.seconds for answer in answers])
            return reading, writing

        return _repeated(turn)


@dataclass(frozen=True)
class InLlamaCpp:
    """A GGUF file in llama.cpp, answer by answer in turns; one sequence at a time.

    Attributes:
        path: of the file.
        vocabulary: number of its tokens.

    Raises:
        MissingExtraError: the binding is not installed.

    """

    path: Path
    vocabulary: int

    def __post_init__(self) -> None:
        require_llama_cpp()

    @property
    def machine(self) -> Facts:
        """Threads and version."""
        return llama_cpp_machine()

    def in_turns(self, removals: Sequence[Removal], request: Request) -> tuple[Seconds, Seconds]:
        """As `Engine` says; a time of decoding is the mean of an answer's tokens.

        Raises:
            ArchitectureError: llama.cpp cannot read what a removal leaves.

        """
        drawn = np.random.default_rng(0).integers(self.vocabulary, size=request.prompt_tokens).tolist()
        with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
            servers = []
            for number, removed in enumerate(removals):
                file = Path(folder) / f"{number}.gguf" if removed else self.path
                if removed:
                    prune_gguf(self.path, removed, file)
                servers.append(running.enter_context(Server(file, request)))

            def turn() -> Turn:
                times = [server.answer(drawn) for server in servers]
                return [prefill for prefill, _ in times], [[decode for _, decode in times]]

            return _repeated(turn)


def engine_of(name: str, loaded: Loaded) -> Engine:
    """The engine of that name, of `excise.settings.ENGINES`, with a model.

    Raises:
        InputError: llama.cpp is to answer with what is no GGUF file, or transformers with a streamed model.
        MissingExtraError: llama.cpp's binding is not installed.

    """
    if name == "transformers":
        return InTransformers(loaded.stack)
    path = Path(loaded.source).expanduser()
    if path.suffix != ".gguf":
        raise InputError(f"llama.cpp reads .gguf files, got {loaded.source}; leave out --engine, or convert it first")
    return InLlamaCpp(path, loaded.stack.config.vocab_size)


def error_of(*parts: Seconds | Sequence[Sequence[float]]) -> float:
    """Standard error of the least sure ratio to the first, from median deviations: outliers are other programs."""
    return max(_error(np.asarray(seconds)) for seconds in parts)


def _error(seconds: Seconds) -> float:
    ratios = seconds / seconds[:, :1]
    deviations = np.median(np.abs(ratios - np.median(ratios, axis=0)), axis=0)
    # 1.4826 median deviations are a standard deviation of a normal, and its median's error is 1.2533 of its mean's.
    return float(1.2533 * 1.4826 * deviations.max() / np.sqrt(len(ratios)))


def _repeated(turn: Callable[[], Turn]) -> tuple[Seconds, Seconds]:
    prefill: list[list[float]] = []
    decode: list[list[float]] = []
    turn()
    started = time.perf_counter()
    while len(prefill) < FEWEST or (error_of(prefill, decode) > SURE and time.perf_counter() - started < LONGEST):
        reading, writing = turn()
        prefill.append(reading)
        decode += writing
    return np.array(prefill), np.array(decode)
