"""Transformers whose feed-forward is a mixture of experts, in all blocks or in some."""

from excise.models.architectures.record import ATTENTION, FEED_FORWARD, MOE, Architecture

SUBLAYERS = (ATTENTION, MOE, FEED_FORWARD)

ARCHITECTURES = (
    Architecture("mixtral", sublayers=SUBLAYERS),
    Architecture("olmoe", sublayers=SUBLAYERS),
    Architecture("gpt_oss", sublayers=SUBLAYERS),
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
