"""Stacks whose blocks mix tokens in several ways: attention, linear attention, convolution, state space models."""

from dataclasses import replace

from excise.models.architectures.readers import linear_in_llama_cpp
from excise.models.architectures.record import ATTENTION, FEED_FORWARD, MOE, Architecture, Period, SublayerRecord

LINEAR_ATTENTION = SublayerRecord("linear-attention", "linear_attn", writes=("linear_attn.out_proj",))
MAMBA = SublayerRecord("mamba", "mamba", writes=("mamba.out_proj",))
OWN_FEED_FORWARD = SublayerRecord("feed-forward", "feed_forward", writes=("feed_forward.down_proj",))
INDICES = ("mamba.layer_idx", "self_attn.layer_idx")

QWEN3_5 = Architecture(
    "qwen3_5_text",
    sublayers=(LINEAR_ATTENTION, ATTENTION, FEED_FORWARD),
    extra_blocks=("mtp_num_hidden_layers",),
    needed_type="full_attention",
    index_attributes=("linear_attn.layer_idx", "self_attn.layer_idx"),
    placements=(
        linear_in_llama_cpp("qwen35", "src/models/qwen35.cpp; conversion/qwen.py writes the interval, and no list"),
    ),
)

ARCHITECTURES = (
    Architecture(
        "nemotron_h",
        sublayers=(
            SublayerRecord("moe", "mixer", present="mixer.experts"),
            SublayerRecord("mamba", "mixer", present="mixer.conv1d"),
            SublayerRecord("attention", "mixer", present="mixer.o_proj"),
            SublayerRecord("feed-forward", "mixer", present="mixer.down_proj"),
        ),
        per_block_keys=("layers_block_type",),
        extra_blocks=("num_nextn_predict_layers",),
        derived_keys=("num_hidden_layers", "hybrid_override_pattern"),
        needed_type="full_attention",
        index_attributes=("layer_idx", "mixer.layer_idx"),
    ),
    Architecture(
        "granitemoehybrid",
        sublayers=(
            MAMBA,
            ATTENTION,
            SublayerRecord(
                "moe",
                "block_sparse_moe",
                writes=("block_sparse_moe.experts.down_proj",),
            ),
            SublayerRecord("feed-forward", "shared_mlp", writes=("shared_mlp.output_linear",)),
        ),
        needed_type="full_attention",
        index_attributes=INDICES,
        logit_divisor="logits_scaling",
    ),
    Architecture(
        "jamba",
        sublayers=(
            MAMBA,
            ATTENTION,
            SublayerRecord(
                "moe", "feed_forward", writes=("feed_forward.experts.down_proj",), present="feed_forward.experts"
            ),
            OWN_FEED_FORWARD,
        ),
        per_block_keys=(),
        periods=(
            Period("attn_layer_period", "attn_layer_offset", "layers_block_type"),
            Period("expert_layer_period", "expert_layer_offset", "layers_num_experts"),
        ),
        needed_type="full_attention",
        index_attributes=INDICES,
    ),
    Architecture(
        "qwen3_next",
        sublayers=(LINEAR_ATTENTION, ATTENTION, MOE, FEED_FORWARD),
        index_lists=("mlp_only_layers",),
        extra_blocks=("num_nextn_predict_layers",),
        needed_type="full_attention",
        index_attributes=("linear_attn.layer_idx", "self_attn.layer_idx"),
        required={"decoder_sparse_step": 1},
        placements=(
            linear_in_llama_cpp(
                "qwen3next", "src/models/qwen3next.cpp; conversion/qwen.py writes the interval, and no list"
            ),
        ),
    ),
    QWEN3_5,
    replace(
        QWEN3_5,
        model_type="qwen3_5",
        stack="model.language_model.layers",
    ),
    Architecture(
        "falcon_h1",
        sublayers=(MAMBA, ATTENTION, OWN_FEED_FORWARD),
        per_block_keys=(),
        index_attributes=INDICES,
        returns_tuple=True,
        logit_multiplier="lm_head_multiplier",
    ),
    Architecture(
        "lfm2",
        sublayers=(
            SublayerRecord("attention", "self_attn", writes=("self_attn.out_proj",)),
            SublayerRecord("convolution", "conv", writes=("conv.out_proj",)),
            SublayerRecord("feed-forward", "feed_forward", writes=("feed_forward.w2",)),
        ),
        index_lists=("full_attn_idxs",),
        needed_type="full_attention",
        index_attributes=("self_attn.layer_idx", "conv.layer_idx"),
    ),
    Architecture(
        "mamba2",
        stack="backbone.layers",
        sublayers=(SublayerRecord("mamba", "mixer"),),
        per_block_keys=(),
        index_attributes=("layer_idx", "mixer.layer_idx"),
    ),
)
