"""Programs that read a checkpoint, and what llama.cpp and others take of a block from its index.

Where a reader takes a list of the blocks' kinds from the config, a pruned checkpoint is right for it. Where it computes
the kind of a block from its index, it is right only if the blocks kept stand in the reader's pattern: see
`excise.models.portable`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from excise.models.architectures.record import Placement


@dataclass(frozen=True)
class Reader:
    """A program that loads checkpoints.

    Attributes:
        title: its name and the versions of which the table speaks.
        without: model types that it does not read at all.

    """

    title: str
    without: frozenset[str] = frozenset()


NOT_IN_4_57 = frozenset({"gemma4", "gemma4_text", "ministral3", "nemotron_h", "qwen3_5", "qwen3_5_text"})
NOT_IN_4_52 = NOT_IN_4_57 | {"falcon_h1", "glm4_moe", "gpt_oss", "lfm2", "qwen3_next", "smollm3"}

READERS: dict[str, Reader] = {
    "transformers": Reader("transformers 5"),
    "transformers-4.57": Reader("transformers 4.53 to 4.57", NOT_IN_4_57),
    "transformers-4.52": Reader("transformers 4.50 to 4.52", NOT_IN_4_52),
    "vllm": Reader("vLLM 0.11 to 0.32"),
    "llama.cpp": Reader("llama.cpp, through its converter (2026)", frozenset({"opt"})),
}

# By llama.cpp's names of architectures; a file or a config may name another period for some.
LLAMA_CPP_PERIODS = {
    "cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2, "llama4": 4, "qwen3next": 4, "qwen35": 4,
    "qwen35moe": 4, "smollm3": 4,
}  # fmt: skip

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def sliding_in_llama_cpp(name: str, source: str) -> Placement:
    """Windows of attention that llama.cpp places by index, since its converter writes no list for this architecture."""
    return Placement("llama.cpp", "layer_types", LLAMA_CPP_PERIODS[name], SLIDING, FULL, source)


def linear_in_llama_cpp(name: str, source: str) -> Placement:
    """Linear attention, likewise; the converter writes the interval that stands in the config."""
    period = LLAMA_CPP_PERIODS[name]
    placement = Placement("llama.cpp", "layer_types", period, LINEAR, FULL, source)
    return replace(placement, period_key="full_attention_interval")
