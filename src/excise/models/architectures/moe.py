"""Transformers whose feed-forward is a mixture of experts, in all blocks or in some."""

from excise.models.architectures.readers import FULL, SLIDING, sliding_in_llama_cpp
from excise.models.architectures.record import ATTENTION, FEED_FORWARD, MOE, Architecture, Placement

SUBLAYERS = (ATTENTION, MOE, FEED_FORWARD)

ARCHITECTURES = (
    Architecture("mixtral", sublayers=SUBLAYERS),
    Architecture("olmoe", sublayers=SUBLAYERS),
    Architecture(
        "gpt_oss",
        sublayers=SUBLAYERS,
        placements=(
            Placement(
                "vllm",
                "layer_types",
                2,
                SLIDING,
                FULL,
                "vllm/model_executor/models/gpt_oss.py of 0.32, OAIAttention: layer_idx % 2",
            ),
            sliding_in_llama_cpp(
                "gpt-oss", "src/models/openai-moe.cpp, set_swa_pattern; conversion/gpt_oss.py writes no pattern"
            ),
        ),
    ),
    Architecture(
        "qwen3_moe",
        sublayers=SUBLAYERS,
        positions=("max_window_layers",),
        index_lists=("mlp_only_layers",),
        required={"decoder_sparse_step": 1},
    ),
    Architecture(
        "deepseek_v3",
        sublayers=SUBLAYERS,
        positions=("first_k_dense_replace",),
        extra_blocks=("num_nextn_predict_layers",),
    ),
    Architecture(
        "glm4_moe",
        sublayers=SUBLAYERS,
        positions=("first_k_dense_replace",),
        extra_blocks=("num_nextn_predict_layers",),
    ),
)
