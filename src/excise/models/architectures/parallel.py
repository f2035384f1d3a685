"""Transformers whose attention and feed-forward read the same input and are added together."""

from excise.models.architectures.record import Architecture, SublayerRecord

ARCHITECTURES = (
    Architecture(
        "gpt_neox",
        stack="gpt_neox.layers",
        sublayers=(SublayerRecord("attention", "attention"), SublayerRecord("feed-forward", "mlp")),
        index_attributes=("attention.layer_idx",),
    ),
)
