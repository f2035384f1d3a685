"""The sizes of a model, read off a skeleton without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from excise.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERTS_USED = ("num_experts_per_tok", "top_k_experts")
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in numbers, not bytes.

    Attributes:
        blocks: [N], parameters of each.
        active: [N], those that a token goes through: of a mixture of experts, a share.
        others: parameters of embedding, final norm and head; tied ones count once.
        width: of the residual stream.
        inner: the widest input of a matrix that a repair is fitted on.
        vocabulary: of the head.

    """

    blocks: tuple[int, ...]
    active: tuple[int, ...]
    others: int
    width: int
    inner: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.blocks) + self.others

    @property
    def active_parameters(self) -> int:
        """What one token is multiplied by in a forward pass, but for the head, which only counted tokens meet."""
        return sum(self.active)

    @staticmethod
    def of(config: PretrainedConfig, trust_remote_code: bool = False) -> Shape:
        """Sizes of the model that a config describes.

        Args:
            config: of the model.
            trust_remote_code: run Python code that comes with it.

        Raises:
            ArchitectureError: a model type that excise does not know.

        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        record = architecture_of(model.config.model_type)
        stack: Any = model.get_submodule(record.stack)
        text = model.config.get_text_config(decoder=True)
        share = _share_of_experts(text)
        blocks = [_numbers(block) for block in stack]
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        # A skeleton's tied weights may still be two.
        twice = head.numel() if model.config.tie_word_embeddings and head is not embedding else 0
        return Shape(
            tuple(blocks),
            tuple(_numbers(block, share) for block in stack),
            _numbers(model) - sum(blocks) - twice,
            embedding.shape[-1],
            max((module.in_features for module in stack.modules() if isinstance(module, nn.Linear)), default=0),
            text.vocab_size,
        )


def _share_of_experts(config: Any) -> float:
    used = next((value for name in EXPERTS_USED if (value := getattr(config, name, None))), None)
    of = next((value for name in EXPERTS if (value := getattr(config, name, None))), None)
    return used / of if used and of else 1.0


def _numbers(module: nn.Module, share: float = 1.0) -> int:
    """Parameters, of which those of routed experts count as a share."""
    routed = {
        name for name, _ in module.named_parameters() if "experts." in name and "shared" not in name and share < 1.0
    }
    return round(sum(p.numel() * (share if name in routed else 1.0) for name, p in module.named_parameters()))
