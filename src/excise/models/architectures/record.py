"""The record of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SublayerRecord:
    """A module whose output is added to the residual stream, alone or times a constant.

    A block has the sublayers whose modules it has: those of a hybrid's blocks differ. Of several records with the same
    `module`, the first that fits a block counts.

    Attributes:
        kind: "attention", "feed-forward", "moe", "mamba", "linear-attention", "convolution" or "per-layer-input".
        module: its path inside the block. Where a post-norm sits inside the residual branch, it is the post-norm: the
            gate belongs on what is added, else a gate at 0 would not equal removal.
        inner: modules before it in the same branch, so that the sublayer's parameters can be counted.
        writes: paths inside the block of the last weights and biases of the branch (or of the modules that own them):
            the sublayer gives exactly 0 where all of them are 0. Empty where a sublayer only goes with its block.
        present: path that a block must have for this record to fit, such as `mlp.experts` for a mixture of experts.

    """

    kind: str
    module: str
    inner: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    present: str = ""


@dataclass(frozen=True)
class Period:
    """A config that places one type of block by arithmetic: the blocks i with i % config[period] == config[offset].

    `pattern` is the config's own list, one entry a block, that it derives from the two.
    """

    period: str
    offset: str
    pattern: str


@dataclass(frozen=True)
class Placement:
    """What one reader takes of a block from its index, whatever the config's list says of that block.

    The reader takes the last of every `period` blocks for `last`, and all others for `usual`.

    Attributes:
        reader: its name in `excise.models.architectures.readers.READERS`.
        key: the config's own list, one entry a block, in whose place the reader does so.
        period: number of blocks.
        usual: entry of that list for most blocks.
        last: entry of that list for the last block of a period.
        source: where the reader does it: file and version.
        period_key: key of config.json from which the reader takes the period where it stands there; `period` is then
            the default.

    """

    reader: str
    key: str
    period: int
    usual: object
    last: object
    source: str
    period_key: str | None = None


ATTENTION = SublayerRecord("attention", "self_attn", writes=("self_attn.o_proj",))
FEED_FORWARD = SublayerRecord("feed-forward", "mlp", writes=("mlp.down_proj",))
MOE_WRITES = (
    "mlp.experts.down_proj",
    "mlp.experts.down_proj_bias",
    "mlp.shared_experts.down_proj",
    "mlp.shared_expert.down_proj",
)
MOE = SublayerRecord("moe", "mlp", writes=MOE_WRITES, present="mlp.experts")


@dataclass(frozen=True)
class Architecture:
    """Everything about a model type that no inspection of its modules can tell safely.

    Config keys are those of the text model's config, which in a multimodal model lies inside the whole config.

    Attributes:
        model_type: `config.model_type` of transformers.
        stack: path of the block list from the causal language model.
        sublayers: what a block adds to its residual stream, in order of computation.
        sliced: tensors outside the blocks with one slice a block: name relative to the module that holds
            the block list, and the dimension that is divided into as many equal slices as there are blocks.
        per_block_keys: config lists with one entry a block, to be cut with the blocks.
        positions: config integers that count blocks from the bottom, recounted after removal (value = how many of the
            first `value` blocks are kept).
        top_counts: config integers that count blocks from the top, recounted likewise.
        index_lists: config lists of block indices, filtered and renumbered.
        periods: types of blocks that the config places by period and offset, found anew; a removal that no period
            describes is refused.
        extra_blocks: config integers that count blocks for multi-token prediction, which transformers neither loads
            into the model nor writes: 0 after removal.
        derived_keys: config properties that transformers derives and does not write; written to config.json too, for
            other loaders.
        kv_sharing: config property that says of each block whether it stores keys and values for others ("store") or
            uses theirs ("reuse").
        last_type: what transformers makes of the last entry of `layer_types`, whatever it says.
        needed_type: entry of `layer_types` of which one must stay: transformers counts the tokens of a hybrid's cache
            in a block of this type, and fails to generate where there is none.
        index_attributes: paths inside a block of attributes that hold the block's index.
        position_attributes: attributes, relative to the module that holds the block list, recounted as `positions`.
        returns_tuple: whether a block returns a tuple, the hidden states first.
        scale: path inside a block of a buffer s by which the block multiplies the whole residual stream at its end.
        required: config key → the only value under which a block does the same thing wherever it stands. A model with
            another value is refused.
        placements: what other readers than the transformers of this machine take of a block from its index.
        learned_positions: whether positions are learned, one embedding each, so that no sample can be longer than
            `max_position_embeddings`.
        logit_divisor, logit_multiplier: config keys by which logits are divided or multiplied.
        logit_softcap: config key c of logits ← c·tanh(logits/c).

    """

    model_type: str
    stack: str = "model.layers"
    sublayers: tuple[SublayerRecord, ...] = (ATTENTION, FEED_FORWARD)
    sliced: tuple[tuple[str, int], ...] = ()
    per_block_keys: tuple[str, ...] = ("layer_types",)
    positions: tuple[str, ...] = ()
    top_counts: tuple[str, ...] = ()
    index_lists: tuple[str, ...] = ()
    periods: tuple[Period, ...] = ()
    extra_blocks: tuple[str, ...] = ()
    derived_keys: tuple[str, ...] = ()
    kv_sharing: str | None = None
    last_type: str | None = None
    needed_type: str | None = None
    index_attributes: tuple[str, ...] = ("self_attn.layer_idx",)
    position_attributes: tuple[str, ...] = ()
    returns_tuple: bool = False
    scale: str | None = None
    required: Mapping[str, object] = field(default_factory=dict)
    placements: tuple[Placement, ...] = ()
    learned_positions: bool = False
    logit_divisor: str | None = None
    logit_multiplier: str | None = None
    logit_softcap: str | None = None
