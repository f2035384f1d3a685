"""Transformers whose attention and feed-forward read the same input and are added together."""

from excise.models.architectures.record import Architecture, SublayerRecord

ARCHITECTURES = (
    Architecture(
        "gpt_neox",
        stack="gpt_neox.layers",
        sublayers=(
            SublayerRecord("attention", "attention", writes=("attention.dense",)),
            SublayerRecord("feed-forward", "mlp", writes=("mlp.dense_4h_to_h",)),
        ),
        index_attributes=("attention.layer_idx",),
    ),
)
