"""What a model can take: token ids within its embedding, and samples no longer than the positions it learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from excise.errors import InputError
from excise.models.architectures import Architecture, architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Fit:
    """Limits of a model.

    Attributes:
        vocabulary: rows of the input embedding; token ids are below it.
        positions: tokens of the longest sample where positions are learned; None where any length can be computed.

    """

    vocabulary: int
    positions: int | None = None

    @staticmethod
    def of(stack: Any) -> Fit:
        """The limits of an `excise.models.stack.Stack`."""
        rows = stack.model.get_input_embeddings().weight.shape[0]
        return Fit(rows, _positions(stack.config, stack.architecture))

    @staticmethod
    def described(config: PretrainedConfig) -> Fit:
        """The limits of the model that a config describes, before it is loaded."""
        text = config.get_text_config(decoder=True)
        return Fit(text.vocab_size, _positions(text, architecture_of(config.model_type)))

    def refusal(self, input_ids: np.ndarray) -> str | None:
        """Why a model cannot take these ids [tokens]; None where it can."""
        if len(input_ids) and int(input_ids.max()) >= self.vocabulary:
            return (
                f"token id {int(input_ids.max())} is outside the model's embedding of {self.vocabulary} rows; the "
                f"tokenizer has tokens that the model lacks"
            )
        if self.positions is not None and len(input_ids) > self.positions:
            return f"{len(input_ids)} tokens, and the model has learned {self.positions} positions; take shorter pieces"
        return None


def _positions(config: PretrainedConfig, record: Architecture) -> int | None:
    return config.max_position_embeddings if record.learned_positions else None


def require_fit(samples: Iterable[Any], stack: Any) -> None:
    """Refuse samples that the model cannot take, before the first forward pass fails on one of them.

    Raises:
        InputError: a token id or a length is out of range; names the sample.

    """
    fit = Fit.of(stack)
    for sample in samples:
        if reason := fit.refusal(sample.input_ids):
            raise InputError(f"{sample.name}: {reason}")
