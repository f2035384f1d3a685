"""llama.cpp's own clock on a GGUF file, through its Python binding xllamacpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from excise.ising.bridges.extras import require
from excise.ising.times import Request
from excise.plain import Facts

BINDING, EXTRA = "xllamacpp", "llama-cpp"
# Errors only, as its programs count them: by default it tells every request on standard error.
QUIET = 1


def require_llama_cpp() -> Any:
    """The binding.

    Raises:
        MissingExtraError: it is not installed.

    """
    return require(BINDING, EXTRA)


class Server:
    """A GGUF file loaded by llama.cpp, that answers with as many threads as PyTorch has.

    Args:
        path: of the file.
        request: the longest it will be asked.

    Raises:
        MissingExtraError: the binding is not installed.

    """

    def __init__(self, path: Path, request: Request) -> None:
        binding = require_llama_cpp()
        parameters = binding.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = request.prompt_tokens + request.new_tokens
        parameters.n_parallel = 1
        parameters.verbosity = QUIET
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        self._new_tokens = request.new_tokens
        self._server: Any = binding.Server(parameters)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The weights go with the object; the binding has no other way to close it.
        self._server = None

    def answer(self, prompt: Sequence[int]) -> tuple[float, float]:
        """Seconds of the prefill of a prompt of token ids, and of each token of a greedy answer after the first."""
        asked = {"prompt": list(prompt), "n_predict": self._new_tokens, "temperature": 0.0}
        # The same prompt comes again and again: kept, it would be read once.
        told = self._server.handle_completions({**asked, "ignore_eos": True, "cache_prompt": False})["timings"]
        return told["prompt_ms"] / 1000, told["predicted_per_token_ms"] / 1000


def llama_cpp_machine() -> Facts:
    """What its speed depends on beside the model.

    Raises:
        MissingExtraError: the binding is not installed.

    """
    return {"xllamacpp": require_llama_cpp().__version__, "threads": torch.get_num_threads()}
