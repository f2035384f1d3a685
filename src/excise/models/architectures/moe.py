"""Transformers whose feed-forward is a mixture of experts."""

from excise.models.architectures.record import ATTENTION, Architecture, SublayerRecord

SUBLAYERS = (ATTENTION, SublayerRecord("moe", "mlp"))

ARCHITECTURES = (
    Architecture("mixtral", sublayers=SUBLAYERS),
    Architecture(
        "qwen3_moe",
        sublayers=SUBLAYERS,
        positions=("max_window_layers",),
        index_lists=("mlp_only_layers",),
        required={"decoder_sparse_step": 1},
    ),
)
