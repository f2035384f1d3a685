"""The record of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SublayerRecord:
    """A module whose output is added to the residual stream.

    `module` is its path inside the block. Where a post-norm sits inside the residual branch, it is the post-norm: the
    gate belongs on what is added, else a gate at 0 would not equal removal. `inner` are then the modules before it in
    the branch, so that the sublayer's parameters can be counted.
    """

    kind: str
    module: str
    inner: tuple[str, ...] = ()


ATTENTION = SublayerRecord("attention", "self_attn")
FEED_FORWARD = SublayerRecord("feed-forward", "mlp")


@dataclass(frozen=True)
class Architecture:
    """Everything about a model type that no inspection of its modules can tell safely.

    Attributes:
        model_type: `config.model_type` of transformers.
        stack: path of the block list from the causal language model.
        tensor_prefixes: names under which the blocks' tensors stand in a checkpoint, each followed by `.index.`; by
            default `stack`. Several where checkpoints of one model type come in several spellings.
        sublayers: what a block adds to its residual stream, in order of computation.
        per_block_keys: config lists with one entry a block, to be cut with the blocks.
        positions: config integers that count blocks from the bottom, recounted after removal (value = how many of the
            first `value` blocks are kept).
        index_attributes: paths inside a block of attributes that hold the block's index.
        index_lists: config lists of block indices, filtered and renumbered.
        required: config key → the only value under which a block does the same thing wherever it stands. A model with
            another value is refused.
        logit_divisor, logit_multiplier: config keys by which logits are divided or multiplied.
        logit_softcap: config key c of logits ← c·tanh(logits/c).

    """

    model_type: str
    stack: str = "model.layers"
    sublayers: tuple[SublayerRecord, ...] = (ATTENTION, FEED_FORWARD)
    per_block_keys: tuple[str, ...] = ("layer_types",)
    positions: tuple[str, ...] = ()
    index_attributes: tuple[str, ...] = ("self_attn.layer_idx",)
    index_lists: tuple[str, ...] = ()
    required: Mapping[str, object] = field(default_factory=dict)
    logit_divisor: str | None = None
    logit_multiplier: str | None = None
    logit_softcap: str | None = None
    tensor_prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tensor_prefixes:
            object.__setattr__(self, "tensor_prefixes", (self.stack,))
