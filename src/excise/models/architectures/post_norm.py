"""Transformers with a norm after the sublayer, inside the residual branch: the gate belongs on that norm's output."""

from dataclasses import replace

from excise.models.architectures.readers import FULL, SLIDING, sliding_in_llama_cpp
from excise.models.architectures.record import Architecture, Placement, SublayerRecord

ATTENTION = SublayerRecord("attention", "post_attention_layernorm", inner=("self_attn",), writes=("self_attn.o_proj",))
FEED_FORWARD = SublayerRecord("feed-forward", "post_feedforward_layernorm", inner=("mlp",), writes=("mlp.down_proj",))
POST_NORMS = (ATTENTION, FEED_FORWARD)

GEMMA3 = Architecture(
    "gemma3_text",
    sublayers=POST_NORMS,
    index_attributes=("layer_idx", "self_attn.layer_idx"),
    placements=(
        sliding_in_llama_cpp("gemma3", "src/models/gemma3.cpp, set_swa_pattern; conversion/gemma.py writes no pattern"),
        Placement(
            "transformers-4.52",
            "layer_types",
            6,
            SLIDING,
            FULL,
            "models/gemma3/modeling_gemma3.py of 4.51.3, Gemma3Attention.is_sliding",
            period_key="sliding_window_pattern",
        ),
    ),
    logit_softcap="final_logit_softcapping",
)

# Gemma 4 sums a dense feed-forward and the experts before their common post-norm. Blocks at the top may use keys and
# values of a block below them, and every block may have an input of its own, sliced from an embedding for all blocks.
GEMMA4 = Architecture(
    "gemma4_text",
    sublayers=(
        ATTENTION,
        SublayerRecord(
            "moe",
            "post_feedforward_layernorm",
            inner=("mlp", "router", "experts", *(f"post_feedforward_layernorm_{i}" for i in (1, 2))),
            writes=("mlp.down_proj", "experts.down_proj"),
            present="experts",
        ),
        FEED_FORWARD,
        SublayerRecord(
            "per-layer-input",
            "post_per_layer_input_norm",
            inner=("per_layer_input_gate", "per_layer_projection"),
            writes=("per_layer_projection",),
        ),
    ),
    sliced=(("embed_tokens_per_layer.weight", 1), ("per_layer_model_projection.weight", 0)),
    top_counts=("num_kv_shared_layers",),
    kv_sharing="kv_sharing_modes",
    last_type="full_attention",
    index_attributes=("layer_idx", "self_attn.layer_idx"),
    position_attributes=("first_kv_shared_layer_idx",),
    scale="layer_scalar",
    logit_softcap="final_logit_softcapping",
)

ARCHITECTURES = (
    Architecture(
        "gemma2",
        sublayers=POST_NORMS,
        placements=(
            sliding_in_llama_cpp(
                "gemma2", "src/models/gemma2.cpp, set_swa_pattern; conversion/gemma.py writes no pattern"
            ),
            Placement(
                "transformers-4.52",
                "layer_types",
                2,
                SLIDING,
                FULL,
                "models/gemma2/modeling_gemma2.py of 4.51.3, Gemma2DecoderLayer.is_sliding",
            ),
        ),
        logit_softcap="final_logit_softcapping",
    ),
    GEMMA3,
    replace(
        GEMMA3,
        model_type="gemma3",
        stack="model.language_model.layers",
        logit_softcap=None,  # which the multimodal class leaves out
    ),
    GEMMA4,
    replace(
        GEMMA4,
        model_type="gemma4",
        stack="model.language_model.layers",
    ),
    Architecture("olmo2", sublayers=POST_NORMS),
)
